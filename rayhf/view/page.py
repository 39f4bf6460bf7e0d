"""The HTML page: one shell for the report and the dashboard, and what browsers may do with it.

Everything that shows text of models is done by the scripts in static/, through DOM nodes and never
as HTML. The content security policy is the second line: no script runs but those of this package,
and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

SCRIPTS = ("source.js", "dom.js", "overview.js", "samples.js", "pairs.js", "timeline.js", "app.js")
"""Files of static/, in the order in which they must run; plotly.js follows."""
STYLE = "style.css"
SERVER_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy of the dashboard. Plotly sets styles from its script."""


@cache
def static(name: str) -> str:
    """Return a file of static/."""
    return files("rayhf.view").joinpath("static", name).read_text(encoding="utf-8")


@cache
def plotly() -> str:
    """Return the source of plotly.js, as the plotly package bundles it."""
    return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")


def report_page(title: str, data: bytes) -> str:
    """Return a page that holds its data (gzip of JSON), scripts and styles."""
    sources = [_inline(text) for text in (*map(static, SCRIPTS), plotly())]
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in sources)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return _render(
        {
            "title": title,
            "policy": policy,
            "style": Markup(static(STYLE)),
            "data": base64.b64encode(data).decode(),
            "sources": [Markup(text) for text in sources],
        }
    )


def dashboard_page(title: str) -> str:
    """Return the page that fetches its data, scripts and styles from the server."""
    return _render(
        {
            "title": title,
            "policy": "",
            "style": "",
            "data": "",
            "names": [*SCRIPTS, "plotly.js"],
        }
    )


def _render(context: Mapping[str, object]) -> str:
    environment = Environment(
        loader=PackageLoader("rayhf.view"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html").render({"sources": [], "names": [], **context})


def _inline(text: str) -> str:
    """Return a script that may stand in HTML: it cannot end its element early."""
    return text.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

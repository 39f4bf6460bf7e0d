"""Hooks of the site's build (mkdocs.yml)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "tests" / "bench" / "RESULTS.md"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Append tests/bench/RESULTS.md, without its title, to the page results.md."""
    if page.file.src_uri != "results.md":
        return markdown
    _, _, measured = RESULTS.read_text(encoding="utf-8").partition("\n")
    return f"{markdown}\n{measured.replace('](../../docs/', '](')}"

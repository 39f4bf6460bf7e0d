"""`rayhf report` and `rayhf dashboard`: pages about runs, from their directories alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from launch.sanitize import print_plain
from rayhf.config.load import load_section
from rayhf.config.service import ServiceConfig
from rayhf.errors import ConfigError

FILE = "report.html"


@contextmanager
def _view_installed() -> Iterator[None]:
    """Say what to install where a package of the `view` extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed; `pip install rayhf[view]` installs what the pages need"
        ) from None


def report(runs: Sequence[Path], out: Path | None, console: Console) -> None:
    """Write one HTML file about `runs`: RUN/report.html, or ./report.html for several."""
    with _view_installed():
        from rayhf.view.report import write_report
    file = out or (runs[0] / FILE if len(runs) == 1 else Path(FILE))
    written = write_report(runs, file)
    sampled = (
        f"; samples of {written.shown} of {written.total} prompts"
        if written.shown < written.total
        else ""
    )
    print_plain(console, f"report: {file} ({written.size / 1e6:.1f} MB{sampled})")


def dashboard(directory: Path, *, port: int | None, service: Path | None, console: Console) -> None:
    """Serve the pages of every run below `directory` until Ctrl-C."""
    with _view_installed():
        from rayhf.view.dashboard import serve
    config = ServiceConfig() if service is None else load_section(service, (), ServiceConfig)
    if port is not None:
        config = config.model_copy(update={"port": port})
    serve(
        directory,
        config,
        base=Path.cwd(),
        announce=lambda url: print_plain(console, f"dashboard: {url} (Ctrl-C ends it)"),
    )

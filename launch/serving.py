"""A campaign's control over gRPC: beside a running campaign, or by itself for one that is not running."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from rayhf.campaign.status import read_status
from rayhf.config.load import load_config
from rayhf.config.service import ServiceConfig


def serve_run(run: Path, overrides: Sequence[str], console: Console) -> None:
    """Until SIGTERM or Ctrl-C. Raises ConfigError where `run` is no run directory, and as the server."""
    read_status(run)
    config = load_config(run / "config.yaml", overrides)
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    with control_served(run, config.service or ServiceConfig(), base=Path.cwd(), console=console):
        told.wait()


@contextmanager
def control_served(run: Path, config: ServiceConfig | None, *, base: Path, console: Console) -> Iterator[None]:
    """Nothing is served where there is no config."""
    if config is None:
        yield
        return
    from rayhf.service.campaign_server import serve_campaign

    server = serve_campaign(run, config, base=base)
    console.print(f"control of {run}: --address {server.address}", markup=False, highlight=False, soft_wrap=True)
    try:
        yield
    finally:
        server.stop()

"""gRPC services: `rayhf serve-scorer`, and the control of a campaign, beside it or by itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from actors.environment import process_env
from launch.models import pin_models
from launch.sanitize import print_plain
from rayhf.config.load import load_config
from rayhf.config.serve import ServeScorerConfig
from rayhf.config.service import ServiceConfig
from rayhf.control.status import read_status
from rayhf.errors import ScorerError
from rayhf.scorer.protocol import ScorerSetup


def serve_scorer(config: ServeScorerConfig, console: Console) -> None:
    """Build the scorers, print their address, and serve until SIGTERM or Ctrl-C.

    Calls in flight may finish. Raises ConfigError, and ScorerError where the scorers are broken and
    the process must be restarted.
    """
    base = Path.cwd()
    config, _ = pin_models(config, base, console)
    scorers = config.scorer
    threads = scorers.threads
    if config.device == "cpu":
        threads = threads or len(os.sched_getaffinity(0))
    engines = any(entry.runs_engine for entry in scorers.train)
    os.environ.update(process_env(config.device, threads, vllm=engines))
    # Imported only now: torch and vLLM read the environment when they are imported.
    from rayhf.scorer.build import build_scorer, check_entries
    from rayhf.scorer.grpc.server import scorer_server

    check_entries(scorers.train, base)
    device = "cuda" if config.device == "gpu" else "cpu"
    engine = build_scorer(
        scorers.train,
        ScorerSetup(base=base, device=device, threads=threads),
        combine=scorers.combine,
    )
    try:
        names = [entry.resolved_name for entry in scorers.train]
        stop = _stop_event()
        fatal: list[Exception] = []

        def broken(error: Exception) -> None:
            fatal.append(error)
            stop.set()

        server = scorer_server(
            engine,
            config.service,
            names=names,
            pairwise=any(entry.is_pairwise for entry in scorers.train),
            base=base,
            broken=broken,
        )
        server.start()
        warn_open(config.service, "send completions to be scored", console)
        print_plain(console, f"serving {', '.join(names)} at {server.address}")
        stop.wait()
        server.stop()
        if fatal:
            raise ScorerError(
                f"{', '.join(names)} fails on a call that succeeded before: {_first_line(fatal[0])}"
            )
    finally:
        engine.close()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def serve_run(run: Path, overrides: Sequence[str], console: Console) -> None:
    """Serve the control of a campaign until SIGTERM or Ctrl-C.

    Raises ConfigError where `run` is no run directory, and as the server.
    """
    read_status(run)
    config = load_config(run / "config.yaml", overrides)
    stop = _stop_event()
    with control_served(run, config.service or ServiceConfig(), base=Path.cwd(), console=console):
        stop.wait()


@contextmanager
def control_served(
    run: Path, config: ServiceConfig | None, *, base: Path, console: Console
) -> Iterator[None]:
    """Serve the control of a campaign for the duration of the block, if there is a config."""
    if config is None:
        yield
        return
    from rayhf.control.grpc_server import serve_campaign

    server = serve_campaign(run, config, base=base)
    warn_open(config, "stop this campaign, label and add prompts", console)
    print_plain(console, f"control of {run}: --address {server.address}")
    try:
        yield
    finally:
        server.stop()


def warn_open(config: ServiceConfig, rights: str, console: Console) -> None:
    """Say what a service on loopback without a token means."""
    if config.token_file is None and (config.tls is None or config.tls.client_ca is None):
        print_plain(
            console,
            f"no token: every user of this machine may {rights}; service.token_file restricts it",
        )


def _stop_event() -> threading.Event:
    """Return an event that SIGTERM and Ctrl-C set from now on."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop

"""gRPC services: `rayhf serve-scorer`, and a campaign's control beside or without the campaign."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from rayhf.config.load import load_config
from rayhf.config.serve import ServeScorerConfig
from rayhf.config.service import ServiceConfig
from rayhf.control.status import read_status
from rayhf.errors import ScorerError
from rayhf.rollout.env import engine_env
from rayhf.scorer.protocol import ScorerSetup


def serve_scorer(config: ServeScorerConfig, console: Console) -> None:
    """Build the scorers, print their address, and serve until SIGTERM or Ctrl-C.

    Calls in flight may finish. Raises ConfigError, and ScorerError where the scorers are broken and
    the process must be restarted.
    """
    scorers = config.scorer
    threads = scorers.threads
    if config.device == "cpu":
        threads = threads or len(os.sched_getaffinity(0))
    os.environ.update(_environment(config, threads))
    # Only now: torch and vLLM read the environment when they are imported.
    from rayhf.scorer.build import build_scorer, check_entries
    from rayhf.scorer.grpc.server import scorer_server

    base = Path.cwd()
    device = "cuda" if config.device == "gpu" else "cpu"
    check_entries(scorers.train, base)
    engine = build_scorer(
        scorers.train,
        ScorerSetup(base=base, device=device, threads=threads),
        combine=scorers.combine,
    )
    try:
        stop = _stop_event()
        errors: list[Exception] = []

        def broken(error: Exception) -> None:
            errors.append(error)
            stop.set()

        names = [entry.resolved_name for entry in scorers.train]
        pairwise = any(entry.is_pairwise for entry in scorers.train)
        server = scorer_server(
            engine, config.service, names=names, pairwise=pairwise, base=base, broken=broken
        )
        server.start()
        console.print(
            f"serving {', '.join(names)} at {server.address}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        stop.wait()
        server.stop()
        if errors:
            raise ScorerError(
                f"{', '.join(names)} fails on a call that succeeded before: {_line(errors[0])}"
            )
    finally:
        engine.close()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _environment(config: ServeScorerConfig, threads: int | None) -> dict[str, str]:
    if any(entry.runs_engine for entry in config.scorer.train):
        return engine_env(config.device, threads)
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return env | {"OMP_NUM_THREADS": str(threads)} if threads else env


def serve_run(run: Path, overrides: Sequence[str], console: Console) -> None:
    """Serve the control of a run until SIGTERM or Ctrl-C.

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
    """Serve the control of a run; nothing where there is no config."""
    if config is None:
        yield
        return
    from rayhf.control.grpc_server import serve_campaign

    server = serve_campaign(run, config, base=base)
    console.print(
        f"control of {run}: --address {server.address}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    try:
        yield
    finally:
        server.stop()


def _stop_event() -> threading.Event:
    """Return an event that SIGTERM and Ctrl-C set from now on."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop

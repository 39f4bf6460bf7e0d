"""What answers over gRPC: `rayhf serve-scorer`, and a campaign's control, beside the campaign or by
itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from rayhf.config.load import load_config
from rayhf.config.scorers import JudgeConfig, is_pairwise
from rayhf.config.serve import ServeScorerConfig
from rayhf.config.service import ServiceConfig
from rayhf.control.status import read_status
from rayhf.errors import ScorerError
from rayhf.rollout.env import engine_env


def serve_scorer(config: ServeScorerConfig, console: Console) -> None:
    """Build the scorers, say where they are, and serve until SIGTERM or Ctrl-C; calls under way may
    end.

    Raises ConfigError, and ScorerError where the scorers are broken and another process must take
    their place.
    """
    base, scorers = Path.cwd(), config.scorer
    threads = scorers.threads
    if config.device == "cpu":
        threads = threads or len(os.sched_getaffinity(0))
    os.environ.update(_environment(config, threads))
    # Only now: torch and vLLM read the environment when they are imported.
    from rayhf.scorer.build import build_scorer, check_entries, entry_name
    from rayhf.scorer.grpc.server import scorer_server

    check_entries(scorers.train, base, combine=scorers.combine)
    device = "cuda" if config.device == "gpu" else "cpu"
    engine = build_scorer(
        scorers.train, combine=scorers.combine, device=device, threads=threads, base=base
    )
    try:
        names = [entry_name(entry) for entry in scorers.train]
        pairwise = any(map(is_pairwise, scorers.train))
        told, fatal = _end_signals(), list[Exception]()

        def broken(error: Exception) -> None:
            fatal.append(error)
            told.set()

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
        told.wait()
        server.stop()
        if fatal:
            raise ScorerError(
                f"{', '.join(names)} cannot even answer what was answered before: {_line(fatal[0])}"
            )
    finally:
        engine.close()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _environment(config: ServeScorerConfig, threads: int | None) -> dict[str, str]:
    if any(isinstance(entry, JudgeConfig) for entry in config.scorer.train):
        return engine_env(config.device, threads)
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return env | {"OMP_NUM_THREADS": str(threads)} if threads else env


def serve_run(run: Path, overrides: Sequence[str], console: Console) -> None:
    """Until SIGTERM or Ctrl-C. Raises ConfigError where `run` is no run directory, and as the
    server."""
    read_status(run)
    config = load_config(run / "config.yaml", overrides)
    told = _end_signals()
    with control_served(run, config.service or ServiceConfig(), base=Path.cwd(), console=console):
        told.wait()


@contextmanager
def control_served(
    run: Path, config: ServiceConfig | None, *, base: Path, console: Console
) -> Iterator[None]:
    """Nothing is served where there is no config."""
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


def _end_signals() -> threading.Event:
    """Set by SIGTERM and Ctrl-C, from now on."""
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    return told

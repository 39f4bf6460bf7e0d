"""`rayhf.run`: a campaign from Python, in a script or in a notebook."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from launch.campaign import run_campaign
from launch.interrupt import Interrupt
from rayhf.config.schema import CampaignConfig
from rayhf.errors import InterruptedRunError
from rayhf.run_dir.lock import RunLock
from rayhf.run_dir.records import read_metrics


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished campaign, as its run directory holds it."""

    directory: Path

    @property
    def metrics(self) -> list[dict[str, float]]:
        """One dict per iteration, from 0; the names are in `rayhf list metrics`."""
        return read_metrics(self.directory)

    @property
    def policy(self) -> Path:
        """The trained policy: a Hugging Face model directory."""
        return self.directory / "policy"


def run(config: CampaignConfig, *, console: Console | None = None) -> RunResult:
    """Start a campaign, or continue the one in `config.run.dir`, and wait for its end.

    Relative paths start at the current directory. Ctrl-C (or a notebook's stop button) interrupts
    it after cleaning up; the same call continues from the last commit.

    Args:
        config: from `rayhf.load_config`.
        console: where progress is shown. Default: standard output.

    Raises the errors of `rayhf.errors`: ConfigError for what can be known before anything starts,
    LockedError where another process runs this campaign, InterruptedRunError when interrupted.
    """
    lock = RunLock(config.run.dir)
    interrupt = Interrupt()
    try:
        with interrupt.on_signals():
            _call(
                lambda: run_campaign(config, console or Console(), lock, interrupt=interrupt),
                interrupt,
            )
    finally:
        lock.release()
    return RunResult(config.run.dir)


def _call(work: Callable[[], None], interrupt: Interrupt) -> None:
    """Call `work`, in a new thread where this one already runs an event loop (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        work()
        return
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  raised again in the calling thread
            errors.append(error)

    thread = threading.Thread(target=guarded, name="campaign")
    thread.start()
    while thread.is_alive():
        try:
            thread.join()
        except (KeyboardInterrupt, InterruptedRunError):
            interrupt.request()
    if errors:
        raise errors[0]

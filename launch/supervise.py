"""`rayhf run --supervise`: runs the campaign in a child process and starts it again when it dies,
until it is done.

For machines without a scheduler that does this. A child that was refused (bad config, locked,
paused, no valid checkpoint) is not started again; one that keeps dying without a new commit is
given up; one whose disk is full, or whose scorer services are all away, is started again every
minute.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from rayhf.control.status import read_status
from rayhf.errors import (
    ActorLostError,
    CheckpointError,
    ConfigError,
    InterruptedRunError,
    LockedError,
    PausedError,
    RayhfError,
    ScorerError,
    SecurityError,
    ServiceError,
    StorageError,
)

CRASHES = 5
"""Deaths in a row without a new commit."""
_FINAL = {
    error.exit_code
    for error in (
        ConfigError,
        LockedError,
        CheckpointError,
        SecurityError,
        PausedError,
        ScorerError,
    )
}
_ELSEWHERE = {error.exit_code for error in (StorageError, ServiceError)}
"""Somebody else will mend it: it costs nothing to ask again."""
_FIRST_WAIT_S, _MAX_WAIT_S = 1.0, 60.0
_PR_SET_PDEATHSIG = 1


def supervise(arguments: Sequence[str], run: Path, console: Console) -> int:
    """The last child's exit code. `arguments` are those of `rayhf`.

    Raises ActorLostError where it is given up, InterruptedRunError where it is told to stop between
    two lives.
    """
    told: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        if child is None:
            raise InterruptedRunError(f"{run}: told to stop; the same command continues")
        told.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    crashes, committed = 0, _committed(run)
    try:
        while True:
            child = subprocess.Popen(
                [sys.executable, "-m", "launch.cli", *arguments], preexec_fn=_end_with_parent
            )
            code = child.wait()
            child = None
            if code == 0 or code in _FINAL or told or _stopped(code):
                return code if code >= 0 else InterruptedRunError.exit_code if told else 1
            now = _committed(run)
            crashes, committed = (1, now) if now > committed else (crashes + 1, committed)
            why = f"signal {-code}" if code < 0 else f"exit code {code}"
            if code in _ELSEWHERE:
                crashes = 0
            if crashes > CRASHES:
                raise ActorLostError(
                    f"{run} ended {crashes} times in a row without a new commit, the last time with {why}; given up"
                )
            wait_s = (
                min(_MAX_WAIT_S, _FIRST_WAIT_S * 2.0 ** (crashes - 1)) if crashes else _MAX_WAIT_S
            )
            console.print(
                f"the campaign ended with {why} after round {now}; it is started again in {wait_s:g} s",
                style="yellow",
            )
            time.sleep(wait_s)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """In the child, before it runs: Linux sends it SIGTERM when its parent dies, however that dies.
    A second start of the same command would otherwise meet a campaign that nobody supervises."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stopped(code: int) -> bool:
    """`rayhf stop`, or a scheduler that told the child itself."""
    return code == InterruptedRunError.exit_code


def _committed(run: Path) -> int:
    try:
        return read_status(run).iteration
    except RayhfError:  # no run directory yet
        return -1

"""`rayhf run --supervise`: run the campaign in a child process, and restart it until it is done.

For machines without a scheduler that does this. A child that was refused (bad config, locked,
paused, no valid checkpoint) is not restarted. One that crashes again and again without a new commit
is given up. One whose disk is full, or whose scorer services are all unreachable, is restarted
every minute.
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

from launch.interrupt import SIGNALS
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
"""Maximum number of crashes in a row without a new commit."""
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
"""A restart would end the same way."""
_EXTERNAL = {error.exit_code for error in (StorageError, ServiceError)}
"""The cause lies outside of the campaign and may go away: these restarts are not counted."""
_FIRST_WAIT_S = 1.0
_MAX_WAIT_S = 60.0
_PR_SET_PDEATHSIG = 1


def supervise(arguments: Sequence[str], run: Path, console: Console) -> int:
    """Run `rayhf` with `arguments`, restart it when it crashes, and return the last exit code.

    Raises ActorLostError where it crashes too often, InterruptedRunError for a signal that arrives
    between two children.
    """
    signals: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        if child is None:
            raise InterruptedRunError(f"{run}: interrupted; the same command continues")
        signals.append(number)
        child.send_signal(number)

    handlers = {number: signal.signal(number, forward) for number in SIGNALS}
    crashes = 0
    committed = _committed(run)
    try:
        while True:
            # -P: a file launch.py in the current directory is not ours.
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "launch.cli", *arguments],
                preexec_fn=_end_with_parent,
                process_group=0,  # a terminal's Ctrl-C reaches it once, forwarded
            )
            code = child.wait()
            child = None
            if code in (0, InterruptedRunError.exit_code) or code in _FINAL or signals:
                return _exit_code(code, interrupted=bool(signals))
            newest = _committed(run)
            crashes = 1 if newest > committed else crashes + 1
            committed = max(committed, newest)
            if code in _EXTERNAL:
                crashes = 0
            cause = f"signal {-code}" if code < 0 else f"exit code {code}"
            if crashes > CRASHES:
                raise ActorLostError(
                    f"{run} crashed {crashes} times in a row without a new commit, the last time "
                    f"with {cause}; not restarting it"
                )
            wait_s = _wait_s(crashes)
            console.print(
                f"the campaign ended with {cause} after iteration {newest}; restarting it in "
                f"{wait_s:g} s",
                style="yellow",
            )
            time.sleep(wait_s)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _exit_code(code: int, *, interrupted: bool) -> int:
    if code >= 0:
        return code
    return InterruptedRunError.exit_code if interrupted else 1


def _wait_s(crashes: int) -> float:
    """Return the time until the next start: longer after every crash; at most a minute."""
    return min(_MAX_WAIT_S, _FIRST_WAIT_S * 2.0 ** (crashes - 1)) if crashes else _MAX_WAIT_S


def _end_with_parent() -> None:
    """Let Linux send this process SIGTERM when its parent dies, however that dies.

    The campaign would otherwise outlive its supervisor and lock out the next one.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _committed(run: Path) -> int:
    """Return the number of committed iterations; -1 without a run directory."""
    try:
        return read_status(run).iteration
    except RayhfError:
        return -1

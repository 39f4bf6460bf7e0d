"""Wait for what other processes and threads do."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from pathlib import Path


def wait_until(condition: Callable[[], object], seconds: float = 30.0, what: str = "") -> None:
    """Poll `condition` until it is true; fail after `seconds`, which only limit a failing test."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what or "the condition stayed false"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


HOLD = """
import fcntl, os
def hold():
    # Let this process and everything that it starts hold a lock on the file `held`.
    fd = os.open("held", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(fd, True)
    fcntl.flock(fd, fcntl.LOCK_EX)
"""
"""For rules: their processes have ids of their own, which say nothing here."""


def is_held(file: Path) -> bool:
    """Whether a process that called `hold`, or one that it started, is there."""
    with open(file, "rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False

"""One launcher per run directory: the lock is taken before anything else is looked at, so that a
second one is refused at once.

Imports nothing heavy: a refusal takes a second.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from rayhf.errors import ConfigError, LockedError


class RunLock:
    """Held until `release` or the end of the process. Makes the directory where it is missing."""

    def __init__(self, run: Path) -> None:
        """Raises LockedError naming who holds it, ConfigError where the directory cannot be
        written."""
        self._run, self._made = run, not run.exists()
        try:
            run.mkdir(parents=True, exist_ok=True)
            self._file = (run / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"run.dir {run} cannot be written: {error.strerror or error}"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "an unknown process"
            self._file.close()
            raise LockedError(f"run directory {run} is in use by {holder}") from None
        self._file.truncate(0)
        self._file.write(
            f"host {socket.gethostname()}, pid {os.getpid()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        )
        self._file.flush()

    def release(self) -> None:
        """Safe to call twice. A directory that was made for this lock and got nothing else is
        removed again."""
        if self._file.closed:
            return
        if self._made and [file.name for file in self._run.iterdir()] == [".lock"]:
            with contextlib.suppress(OSError):
                (self._run / ".lock").unlink()
                self._run.rmdir()
        self._file.close()

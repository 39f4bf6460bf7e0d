"""The lock of a run directory: one launcher at a time.

It is taken before anything else, so that a second launcher is refused within a second; this module
therefore imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from rayhf.errors import ConfigError, LockedError, StorageError, is_full_disk


def _refusal(run: Path, error: OSError) -> ConfigError | StorageError:
    message = f"run.dir {run} cannot be written: {error.strerror or error}"
    return StorageError(message) if is_full_disk(error) else ConfigError(message)


class RunLock:
    """An exclusive lock, held until `release` or the end of the process."""

    def __init__(self, run: Path) -> None:
        """Take the lock, and create the directory where it is missing.

        Raises LockedError that names the holder, ConfigError for a directory that cannot be
        written, StorageError where the disk is full.
        """
        self._run = run
        self._created = not run.exists()
        try:
            run.mkdir(parents=True, exist_ok=True)
            self._file = (run / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise _refusal(run, error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "an unknown process"
            self._file.close()
            raise LockedError(f"run directory {run} is in use by {holder}") from None
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        try:
            self._file.truncate(0)
            self._file.write(f"host {socket.gethostname()}, pid {os.getpid()}, since {now}")
            self._file.flush()
        except OSError as error:
            raise _refusal(run, error) from None

    def release(self) -> None:
        """Release the lock, and remove a directory that was created for it and is still empty.

        Safe to call twice.
        """
        if self._file.closed:
            return
        if self._created and [file.name for file in self._run.iterdir()] == [".lock"]:
            with contextlib.suppress(OSError):
                (self._run / ".lock").unlink()
                self._run.rmdir()
        self._file.close()

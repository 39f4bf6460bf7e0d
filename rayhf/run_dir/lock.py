"""The lock of a run directory: one launcher at a time.

It is taken before anything else, so that a second launcher is refused within a second; this module
therefore imports nothing heavy. The lock belongs to the file `.lock` of that moment: a launcher
whose file was removed or replaced no longer holds it, and `check` ends it before its next write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from datetime import UTC, datetime
from pathlib import Path

from rayhf.errors import (
    CheckpointError,
    ConfigError,
    FencedError,
    LockedError,
    StorageError,
    is_full_disk,
)
from rayhf.run_dir.files import open_file
from rayhf.run_dir.names import check_links, numbered

FILE = ".lock"
_BEFORE_CAMPAIGN = {FILE, ".campaign.json.tmp"}
"""What a launcher that was killed in its first moment leaves."""


class RunLock:
    """An exclusive lock, held until `release` or the end of the process."""

    def __init__(self, run: Path) -> None:
        """Take the lock, and create the directory where it is missing.

        Raises LockedError that names the holder, ConfigError for a directory that cannot be
        written, has links in it or holds other files, CheckpointError for one that lost its
        campaign.json, StorageError where the disk is full. Nothing in such a directory is changed.
        """
        self._run = run
        self._created = not run.exists()
        try:
            run.mkdir(parents=True, exist_ok=True)
            check_links(run)
            _check_content(run)
            self._file = open_file(run / FILE, "a+b")
        except OSError as error:
            raise _refusal(run, error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().decode(errors="replace").strip() or "an unknown process"
            self._file.close()
            raise LockedError(f"run directory {run} is in use by {holder}") from None
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        try:
            self.check()  # its file may have been removed since it was opened
            self._file.truncate(0)
            text = f"host {socket.gethostname()}, pid {os.getpid()}, since {now}"
            self._file.write(text.encode())
            self._file.flush()
        except OSError as error:
            self._file.close()
            raise _refusal(run, error) from None
        except FencedError:
            self._file.close()
            raise

    def check(self) -> None:
        """Raise FencedError unless `.lock` is still the file that this process locked."""
        try:
            there = os.lstat(self._run / FILE)
        except (FileNotFoundError, NotADirectoryError):
            there = None
        except OSError as error:
            raise StorageError(f"{self._run / FILE}: cannot be read ({error.strerror})") from None
        own = os.fstat(self._file.fileno())
        if there is None or (there.st_dev, there.st_ino) != (own.st_dev, own.st_ino):
            action = "was removed" if there is None else "was replaced"
            raise FencedError(
                f"{self._run / FILE} {action} while this process held the lock, so another one may "
                "own the run directory; nothing was written since"
            )

    def release(self) -> None:
        """Release the lock, and remove a directory that was created for it and is still empty.

        Safe to call twice.
        """
        if self._file.closed:
            return
        with contextlib.suppress(OSError, FencedError, StorageError):
            if self._created and os.listdir(self._run) == [FILE]:
                self.check()
                (self._run / FILE).unlink()
                self._run.rmdir()
        self._file.close()


def _refusal(run: Path, error: OSError) -> ConfigError | StorageError:
    message = f"run.dir {run} cannot be written: {error.strerror or error}"
    return StorageError(message) if is_full_disk(error) else ConfigError(message)


def _check_content(run: Path) -> None:
    """Raise ConfigError or CheckpointError for files without a campaign.json beside them."""
    names = set(os.listdir(run))
    if os.path.lexists(run / "campaign.json") or names <= _BEFORE_CAMPAIGN:
        if FILE in names and not stat.S_ISREG(os.lstat(run / FILE).st_mode):
            raise OSError(errno.EINVAL, f"{FILE} is not a file")
        return
    checkpoints = numbered(run / "checkpoints", "iteration-")
    if checkpoints:
        raise CheckpointError(
            f"{run} has checkpoints up to iteration {max(checkpoints)}, but its campaign.json is "
            "missing; nothing was changed: restore campaign.json from a copy, or choose another "
            "run.dir"
        )
    foreign = sorted(names - _BEFORE_CAMPAIGN)
    raise ConfigError(
        f"run.dir {run} is not empty and holds no campaign ({', '.join(foreign[:3])}"
        f"{', ...' if len(foreign) > 3 else ''}); expected a new or empty directory, or one with "
        "campaign.json"
    )


def is_locked(run: Path) -> bool:
    """Return whether a process of this machine holds the lock of a run directory.

    Takes no lock, so that it can never refuse a launcher. Raises OSError.
    """
    with open_file(run / FILE, "rb") as file:
        inode = os.fstat(file.fileno()).st_ino
        device = _device(file.fileno())
    locks = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
    entries = [line.split() for line in locks]
    return any(entry[1:2] == ["FLOCK"] and entry[5] == f"{device}:{inode}" for entry in entries)


def _device(descriptor: int) -> str:
    """Return the device of an open file as /proc/locks writes it, hexadecimal "major:minor".

    Of its mount: what `stat` returns is another number on overlayfs and btrfs.
    """
    info = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="utf-8").split()
    mount = info[info.index("mnt_id:") + 1]
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        number, _, device = line.split()[:3]
        if number == mount:
            major, minor = device.split(":")
            return f"{int(major):02x}:{int(minor):02x}"
    raise FileNotFoundError(errno.ENOENT, f"mount {mount} is not in /proc/self/mountinfo")

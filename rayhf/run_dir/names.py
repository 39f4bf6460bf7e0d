"""Names in a run directory: what rayhf wrote is found by its exact name, and links are refused.

Editors, network file systems and people leave other files beside these (`.nfs000001`,
`iteration-000001.bak`, `iteration-000002 (copy).parquet`): they are ignored everywhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from rayhf.errors import ConfigError
from rayhf.run_dir.files import storage_errors

_FOLDERS = (
    "samples",
    "examples",
    "credit",
    "heldout",
    "checkpoints",
    "journal",
    "population",
    "inbox",
    "inbox/taken",
    "logs",
)


def iteration_name(iteration: int) -> str:
    """Return the stem of every file and directory that belongs to one iteration."""
    return f"iteration-{iteration:06d}"


def unhealthy_name(iteration: int) -> str:
    """Return the directory name of a checkpoint at which a guard paused the campaign."""
    return f"unhealthy-{iteration:06d}"


def numbered(directory: Path, prefix: str, suffix: str = "", *, digits: int = 6) -> dict[int, Path]:
    """Return what is named PREFIX, a number, SUFFIX in a directory, by ascending number.

    None where the directory is missing. Raises StorageError where it cannot be read.
    """
    pattern = re.compile(f"{re.escape(prefix)}([0-9]{{{digits},12}}){re.escape(suffix)}")
    with storage_errors("read", directory):
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            return {}
    found = {}
    for name in names:
        match = pattern.fullmatch(name)
        if match and match[1] == f"{int(match[1]):0{digits}d}":
            found[int(match[1])] = directory / name
    return dict(sorted(found.items()))


def event_logs(run: Path) -> list[Path]:
    """Return the event logs of all attempts, oldest first."""
    attempts = numbered(run / "logs", "attempt-", digits=4).values()
    return [file for attempt in attempts if (file := attempt / "events.jsonl").exists()]


def check_links(run: Path) -> None:
    """Raise ConfigError for a symbolic link in a run directory.

    Through one, files elsewhere would be read, overwritten, deleted or exported. The run directory
    itself may be reached through a link.
    """
    for folder in ("", *_FOLDERS):  # a folder is looked into once it is known to be none
        try:
            with os.scandir(run / folder) as entries:
                link = next((entry.path for entry in entries if entry.is_symlink()), None)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            with storage_errors("read", run / folder):
                raise
        if link is not None:
            raise ConfigError(
                f"{link} is a symbolic link; expected no links in a run directory: replace it by "
                "what it points to"
            )

"""The import path of a process that imports modules of the user's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

USER_FOLDER = "RAYHF_USER_FOLDER"
"""Environment variable with the directory in which the command was given."""

_ROOT = str(Path(__file__).parents[2])
"""Where rayhf, actors and launch are; of an editable install, not on the path."""


def user_folder() -> str:
    """Return the directory in which the command was given.

    Ray may unpack a job's directory anew while the job starts: the current directory then no
    longer exists, and the path that the command line noted is the new one's.
    """
    try:
        return os.getcwd()
    except FileNotFoundError:
        return os.environ[USER_FOLDER]


def import_path(entries: Sequence[str], folder: str) -> list[str]:
    """Return the entries of a path, then rayhf's directory, then the user's `folder`.

    Nothing in the user's folder replaces a module of Python's, of rayhf's or of an installed
    package.
    """
    others = [entry for entry in entries if entry not in ("", folder)]
    own = [] if _ROOT in (*others, folder) else [_ROOT]
    return [*others, *own, folder]

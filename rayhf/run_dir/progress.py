"""What a campaign reports while it runs (events.jsonl, progress.json), and how it is read back.

Messages may contain text that a model or a scorer wrote, also text that is not valid Unicode: JSON
escapes it, and nothing here validates it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rayhf.run_dir.files import open_file, read_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A line of events.jsonl."""

    time: str
    """ISO 8601, UTC."""
    epoch: int
    kind: str
    """phase, commit, fault, warn, pause, unpause, continue, end ..."""
    message: str
    code: int | None = None
    """Exit code, with kind `end`."""


def parse_event(line: bytes) -> Event | None:
    """Return the event in a line; None for a line that a crash left incomplete."""
    try:
        row = json.loads(line)
        return Event(
            time=row["time"],
            epoch=row["epoch"],
            kind=row["kind"],
            message=row["message"],
            code=row.get("code"),
        )
    except (ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The content of progress.json: what the campaign is doing now."""

    epoch: int = 0
    iteration: int | None = None
    phase: str = ""
    done: int = 0
    """Prompts of `total` that finished the phase."""
    total: int = 0
    """0 for a phase that does not count prompts."""
    time: float | None = None
    """When anything moved last, in seconds since 1970."""
    alive: float = 0.0
    """When the process wrote this, in seconds since 1970."""
    waiting: str = ""
    """What the campaign waits for; empty where it runs."""


def write_progress(run: Path, progress: Progress) -> None:
    """Replace progress.json, atomically but without fsync: it is outdated within a second."""
    temporary = run / ".progress.json.tmp"
    with open_file(temporary, "wb") as file:
        file.write(json.dumps(asdict(progress)).encode())
    temporary.replace(run / "progress.json")


def read_progress(run: Path) -> Progress | None:
    """Return the content of progress.json; None where it is missing or cannot be read."""
    try:
        return Progress(**json.loads(read_bytes(run / "progress.json")))
    except (OSError, ValueError, TypeError):
        return None

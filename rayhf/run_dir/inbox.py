"""What people hand in while a campaign runs: prompts to ask next, and their verdicts on pairs of
answers.

inbox/prompts.jsonl, inbox/labels.jsonl     appended by whoever hands in; a line is there whole or
                                            not at all
inbox/taken/labels-000012.json              what round 12 took, written before the round uses it

A row is taken by one round, once; a round that is played again takes what it took before. Handing
in needs no lock on the run directory and asks nobody: the campaign may be paused, or not be running
at all.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rayhf.run_dir.files import storage_errors, write_json

Kind = Literal["prompts", "labels"]


def submit_rows(
    run: Path, kind: Kind, rows: Sequence[Mapping[str, Any]], *, source: str
) -> list[str]:
    """Append rows, each with an id, the time and its source; returns the ids once they are on the
    disk."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    signed = [{"id": uuid.uuid4().hex, "time": now, "source": source, **row} for row in rows]
    data = "".join(json.dumps(row) + "\n" for row in signed).encode()
    folder = run / "inbox"
    with storage_errors("write", folder):
        folder.mkdir(exist_ok=True)
        with (folder / f"{kind}.jsonl").open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.tell() and not _ends_with_newline(file):  # somebody died while writing
                data = b"\n" + data
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    return [row["id"] for row in signed]


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def submitted_rows(run: Path, kind: Kind) -> list[dict[str, Any]]:
    """Every row so far, oldest first. A torn line does not count: its hand-in was never
    confirmed."""
    try:
        lines = (run / "inbox" / f"{kind}.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "id" in row:
            found.append(row)
    return found


class Inbox:
    """The campaign's side: it alone takes."""

    def __init__(self, run: Path) -> None:
        self._run = run

    def take(self, kind: Kind, iteration: int, *, most: int | None = None) -> list[dict[str, Any]]:
        """The rows of round `iteration`: those that it took already, else at most `most` of those
        nobody took."""
        folder = self._run / "inbox" / "taken"
        own = folder / f"{kind}-{iteration:06d}.json"
        if own.exists():
            found: list[dict[str, Any]] = json.loads(own.read_text(encoding="utf-8"))
            return found
        waiting = submitted_rows(self._run, kind)
        if not waiting:
            return []
        with storage_errors("write", folder):
            folder.mkdir(exist_ok=True)
        taken = {
            row["id"]
            for file in folder.glob(f"{kind}-*.json")
            for row in json.loads(file.read_text(encoding="utf-8"))
        }
        rows = [row for row in waiting if row["id"] not in taken][:most]
        if rows:
            write_json(own, rows)
        return rows

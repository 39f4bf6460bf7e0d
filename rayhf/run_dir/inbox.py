"""Prompts and labels that people submit while a campaign runs.

inbox/prompts.jsonl, inbox/labels.jsonl   appended by submitters, one complete line per row
inbox/taken/labels-000012.json            what iteration 12 took, written before it is used

A row is taken by one iteration, once; an iteration that is repeated takes what it took before.
Submitting needs no lock on the run directory: the campaign may be paused, or not running at all.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal

from rayhf.run_dir.files import storage_errors, write_json
from rayhf.types import JsonObject

RowType = Literal["prompts", "labels"]


def submit_rows(
    run: Path, row_type: RowType, rows: Sequence[Mapping[str, object]], *, source: str
) -> list[str]:
    """Append rows with an id, the time and their source.

    Returns the ids once the rows are on the disk.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    ids = [uuid.uuid4().hex for _ in rows]
    lines = [
        json.dumps({"id": row_id, "time": now, "source": source, **row})
        for row_id, row in zip(ids, rows, strict=True)
    ]
    data = "".join(f"{line}\n" for line in lines).encode()
    folder = run / "inbox"
    with storage_errors("write", folder):
        folder.mkdir(exist_ok=True)
        with (folder / f"{row_type}.jsonl").open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.tell() and not _ends_with_newline(file):  # an earlier submitter crashed
                data = b"\n" + data
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    return ids


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def submitted_rows(run: Path, row_type: RowType) -> list[JsonObject]:
    """Return every row so far, oldest first.

    A torn line does not count: its submission was never confirmed.
    """
    try:
        lines = (run / "inbox" / f"{row_type}.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return []
    rows: list[JsonObject] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "id" in row:
            rows.append(row)
    return rows


class Inbox:
    """The campaign's side of the inbox: the only one that takes rows."""

    def __init__(self, run: Path) -> None:
        self._run = run

    def take(
        self, row_type: RowType, iteration: int, *, limit: int | None = None
    ) -> list[JsonObject]:
        """Return the rows of an iteration.

        These are the ones it took before; otherwise at most `limit` rows that no iteration has
        taken.
        """
        folder = self._run / "inbox" / "taken"
        own = folder / f"{row_type}-{iteration:06d}.json"
        if own.exists():
            return _read(own)
        submitted = submitted_rows(self._run, row_type)
        if not submitted:
            return []
        with storage_errors("write", folder):
            folder.mkdir(exist_ok=True)
        taken = {row["id"] for file in folder.glob(f"{row_type}-*.json") for row in _read(file)}
        rows = [row for row in submitted if row["id"] not in taken][:limit]
        if rows:
            write_json(own, rows)
        return rows


def _read(file: Path) -> list[JsonObject]:
    rows: list[JsonObject] = json.loads(file.read_text(encoding="utf-8"))
    return rows

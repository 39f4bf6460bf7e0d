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
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal

from rayhf.run_dir.files import (
    Check,
    checksum,
    open_file,
    read_bytes,
    storage_errors,
    write_json,
)
from rayhf.run_dir.names import check_links, numbered
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
    check_links(run)
    with storage_errors("write", folder):
        folder.mkdir(exist_ok=True)
        with open_file(folder / f"{row_type}.jsonl", "ab+") as file:
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
    file = run / "inbox" / f"{row_type}.jsonl"
    with storage_errors("read", file):
        lines = read_bytes(file).splitlines() if file.exists() else []
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
    """The campaign's side of the inbox: the only one that takes rows.

    Args:
        run: its run directory.
        check: called before anything is written.
        warn: gets a line for each damaged file.
    """

    def __init__(self, run: Path, *, check: Check, warn: Callable[[str], None]) -> None:
        self._run = run
        self._check = check
        self._warn = warn

    def take(
        self,
        row_type: RowType,
        iteration: int,
        *,
        limit: int | None = None,
        is_ready: Callable[[JsonObject], bool] = lambda row: True,
    ) -> list[JsonObject]:
        """Return the rows of an iteration.

        These are the ones it took before; otherwise at most `limit` rows that no iteration has
        taken and that are ready. The others wait. Where the record of what it took is damaged, it
        takes them again.
        """
        folder = self._run / "inbox" / "taken"
        own = folder / f"{row_type}-{iteration:06d}.json"
        if own.exists():
            rows, _ = self._read(own)
            if rows is not None:
                return rows
        submitted = submitted_rows(self._run, row_type)
        if not submitted:
            return []
        with storage_errors("write", folder):
            folder.mkdir(exist_ok=True)
        taken: set[str] = set()
        for number, file in numbered(folder, f"{row_type}-", ".json").items():
            if number != iteration:
                taken |= self._read(file)[1]
        rows = [row for row in submitted if row["id"] not in taken and is_ready(row)][:limit]
        if rows:
            write_json(own, {"rows": rows, "checksum": checksum({"rows": rows})}, self._check)
        return rows

    def _read(self, file: Path) -> tuple[list[JsonObject] | None, set[str]]:
        """Return the rows in a file, None where it is damaged, and the ids that can be read."""
        with storage_errors("read", file):
            data = read_bytes(file)
        try:
            content = json.loads(data)
            own = content.pop("checksum")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            own = None
        if own is None or own != checksum(content):
            self._warn(f"inbox/taken/{file.name} is damaged")
            return None, set(re.findall('"id": "([0-9a-f]{32})"', data.decode(errors="replace")))
        rows: list[JsonObject] = content["rows"]
        return rows, {str(row["id"]) for row in rows}

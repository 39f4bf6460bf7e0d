"""Checksums of the files that iterations leave outside of checkpoints (checksums.jsonl).

One line per iteration, appended when it ends: size and SHA-256 of its samples and its examples, the
SHA-256 of its line in metrics.jsonl, and the line's own checksum. The manifest of a checkpoint says
how long the file was at its commit, and its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TypedDict

from pydantic import JsonValue

from rayhf.run_dir.files import checksum, open_file, read_bytes, storage_errors
from rayhf.types import JsonObject

FILE = "checksums.jsonl"


class FileChecksum(TypedDict):
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str


class IterationChecksums(TypedDict):
    """A line of checksums.jsonl."""

    iteration: int
    files: dict[str, FileChecksum]
    """By path below the run directory."""
    metrics: str
    """SHA-256 of the iteration's line in metrics.jsonl, without its end."""


class ChecksumLog:
    """The campaign's side of checksums.jsonl: the only one that writes it."""

    def __init__(self, run: Path) -> None:
        self._file = run / FILE
        self._noted: dict[int, dict[str, FileChecksum]] = {}
        self._hash = hashlib.sha256()
        self._size = 0

    def note(self, iteration: int, name: str, entry: FileChecksum) -> None:
        """Keep a file's checksum until its iteration's line is appended."""
        self._noted.setdefault(iteration, {})[name] = entry

    def append(self, iteration: int, metrics: bytes) -> None:
        """Append an iteration's line; `metrics` is its line in metrics.jsonl, without its end."""
        content: IterationChecksums = {
            "iteration": iteration,
            "files": self._noted.pop(iteration, {}),
            "metrics": hashlib.sha256(metrics).hexdigest(),
        }
        line = json.dumps({**content, "checksum": checksum(content)}).encode() + b"\n"
        with storage_errors("write", self._file), open_file(self._file, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._hash.update(line)
        self._size += len(line)

    def committed(self) -> dict[str, JsonValue]:
        """Return what a checkpoint's manifest says of the file."""
        return {"bytes": self._size, "sha256": self._hash.hexdigest()}

    def rewind(self, size: int) -> None:
        """Drop everything after the first `size` bytes."""
        self._noted = {}
        with storage_errors("write", self._file), open_file(self._file, "a+b") as file:
            file.truncate(min(size, file.tell()))
            file.seek(0)
            data = file.read()
        self._hash = hashlib.sha256(data)
        self._size = len(data)


def read_checksums(run: Path) -> tuple[dict[int, IterationChecksums], list[str]]:
    """Return the lines by iteration, and what is wrong with others. Raises OSError."""
    try:
        lines = read_bytes(run / FILE).split(b"\n")[:-1]
    except FileNotFoundError:
        return {}, []
    by_iteration: dict[int, IterationChecksums] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
            own = content.pop("checksum")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            own = content = None
        if own is None or own != checksum(content):
            problems.append(f"line {number} is damaged")
            continue
        by_iteration[content["iteration"]] = content
    return by_iteration, problems


def differs(run: Path, committed: JsonObject) -> bool:
    """Return whether the file is not the one of a commit. Raises OSError."""
    data = b""
    if committed["bytes"]:
        data = read_bytes(run / FILE)[: int(str(committed["bytes"]))]
    return hashlib.sha256(data).hexdigest() != committed["sha256"]

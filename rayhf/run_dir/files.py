"""Atomic writes: a file or directory appears complete or not at all.

In: bytes, or a directory that is finished. Out: the same under its final name, on the disk; a
sealed directory has a manifest with the size and SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydantic import JsonValue

from rayhf.errors import CheckpointError, StorageError
from rayhf.types import JsonObject

MANIFEST = "MANIFEST.json"


def iteration_name(iteration: int) -> str:
    """Return the stem of every file and directory that belongs to one iteration."""
    return f"iteration-{iteration:06d}"


def unhealthy_name(iteration: int) -> str:
    """Return the directory name of a checkpoint at which a guard paused the campaign."""
    return f"unhealthy-{iteration:06d}"


def iteration_of(path: Path) -> int:
    """Return the number in a name made by `iteration_name`."""
    return int(path.stem.removeprefix("iteration-"))


@contextmanager
def storage_errors(action: str, path: Path) -> Iterator[None]:
    """Translate the operating system's errors (full disk, no permission) into StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot {action} {path}: {error.strerror or error}") from error


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing, then fsync it, rename it and fsync its directory.

    The temporary file stays behind where writing fails.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors("write", path):
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_path(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file's content."""
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: Path, value: object) -> None:
    """Replace a file by `value` as JSON. Raises ValueError for NaN and infinity."""
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(directory: Path) -> list[Path]:
    """List all files but the manifest.

    Raises CheckpointError for a symbolic link: a checkpoint must not depend on files elsewhere.
    """
    paths = sorted(directory.rglob("*"))
    for path in (directory, *paths):
        if path.is_symlink():
            raise CheckpointError(
                f"{directory}: {path.name} is a symbolic link; expected a file in this directory"
            )
    return [path for path in paths if path.is_file() and path != directory / MANIFEST]


def seal(temporary: Path, final: Path, facts: Mapping[str, object]) -> None:
    """Make a finished directory durable under its final name.

    Order: fsync every file, write the manifest (`facts` and the file list), rename, fsync the
    parent. A directory with a valid manifest is therefore complete.
    """
    with storage_errors("commit", final):
        entries = {}
        for file in _files(temporary):
            fsync_path(file)
            entries[str(file.relative_to(temporary))] = {
                "bytes": file.stat().st_size,
                "sha256": sha256(file),
            }
        content = {**facts, "files": entries}
        write_json(temporary / MANIFEST, {**content, "checksum": _checksum(content)})
        for directory in (path for path in temporary.rglob("*") if path.is_dir()):
            fsync_path(directory)
        fsync_path(temporary)
        temporary.rename(final)
        fsync_path(final.parent)


def _checksum(content: Mapping[str, object]) -> str:
    """Hash a manifest's own content: a manifest with a flipped bit may still be valid JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify(directory: Path) -> JsonObject:
    """Check every file against the manifest and return the manifest's facts.

    Raises CheckpointError that names the first file that is missing, unexpected or changed.
    """
    manifest = directory / MANIFEST
    try:
        facts: dict[str, JsonValue] = json.loads(manifest.read_text(encoding="utf-8"))
        checksum = facts.pop("checksum")
        expected = _expected_files(facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory}: {MANIFEST} cannot be read ({error})") from None
    if checksum != _checksum(facts):
        raise CheckpointError(f"{directory}: {MANIFEST} does not match its own checksum")
    present = {str(path.relative_to(directory)): path for path in _files(directory)}
    for name in expected.keys() ^ present.keys():
        problem = "is missing" if name in expected else "is not in the manifest"
        raise CheckpointError(f"{directory}: {name} {problem}")
    for name, (size, digest) in expected.items():
        actual = present[name].stat().st_size
        if actual != size:
            raise CheckpointError(
                f"{directory}: {name} has {actual} bytes, the manifest says {size}"
            )
        if sha256(present[name]) != digest:
            raise CheckpointError(f"{directory}: {name} does not have the manifest's checksum")
    return facts


def _expected_files(facts: JsonObject) -> dict[str, tuple[int, str]]:
    """Return the size and SHA-256 of each file in a manifest. Raises TypeError for another form."""
    files = facts["files"]
    if not isinstance(files, dict):
        raise TypeError("`files` is not an object")
    expected = {}
    for name, entry in files.items():
        if not isinstance(entry, dict):
            raise TypeError(f"the entry of {name} is not an object")
        size = entry["bytes"]
        digest = entry["sha256"]
        if not (isinstance(size, int) and isinstance(digest, str)):
            raise TypeError(f"the entry of {name} has no size or SHA-256")
        expected[name] = (size, digest)
    return expected

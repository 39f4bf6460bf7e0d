"""Whole writes: a file or directory is either there in full or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rayhf.errors import CheckpointError, StorageError

MANIFEST = "MANIFEST.json"


@contextmanager
def storage_errors(what: str, path: Path) -> Iterator[None]:
    """Translate the operating system's refusals (full disk, no permission) into StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot {what} {path}: {error.strerror or error}") from error


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary file to write to; in the end fsync, rename, fsync of the directory. Left behind
    where the writing failed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors("write", path):
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_path(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(directory: Path) -> list[Path]:
    """All but the manifest. Raises CheckpointError for a link: a checkpoint is in its directory and
    nowhere else."""
    found = sorted(directory.rglob("*"))
    for path in (directory, *found):
        if path.is_symlink():
            raise CheckpointError(
                f"{directory}: {path.name} is a symbolic link; expected it to be here itself"
            )
    return [path for path in found if path.is_file() and path != directory / MANIFEST]


def seal(temporary: Path, final: Path, facts: dict[str, Any]) -> None:
    """Make a finished directory durable: fsync every file, write the manifest last, rename, fsync
    the parent."""
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
        for directory in (p for p in temporary.rglob("*") if p.is_dir()):
            fsync_path(directory)
        fsync_path(temporary)
        temporary.rename(final)
        fsync_path(final.parent)


def _checksum(content: dict[str, Any]) -> str:
    """Of a manifest's own content: a manifest with a flipped bit may still be JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify(directory: Path) -> dict[str, Any]:
    """The manifest's facts. Raises CheckpointError naming the first file that is missing,
    unexpected or changed."""
    manifest = directory / MANIFEST
    try:
        facts: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
        checksum = facts.pop("checksum")
        expected = {
            str(name): (entry["bytes"], entry["sha256"]) for name, entry in facts["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory}: no readable manifest ({error})") from None
    if checksum != _checksum(facts):
        raise CheckpointError(f"{directory}: {MANIFEST} is not as it was written")
    found = {str(p.relative_to(directory)): p for p in _files(directory)}
    for name in expected.keys() ^ found.keys():
        raise CheckpointError(
            f"{directory}: {name} is {'missing' if name in expected else 'not in the manifest'}"
        )
    for name, (size, checksum) in expected.items():
        found_size = found[name].stat().st_size
        if found_size != size:
            raise CheckpointError(
                f"{directory}: {name} has {found_size} bytes, the manifest says {size}"
            )
        if sha256(found[name]) != checksum:
            raise CheckpointError(f"{directory}: {name} does not have the manifest's checksum")
    return facts

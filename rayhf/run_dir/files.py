"""Atomic writes: a file or directory appears complete or not at all.

In: bytes, or a directory that is finished. Out: the same under its final name, on the disk; a
sealed directory has a manifest with the size and SHA-256 of every file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from pydantic import JsonValue

from rayhf.errors import CheckpointError, StorageError
from rayhf.types import JsonObject

MANIFEST = "MANIFEST.json"
Check = Callable[[], None]
"""Raises FencedError where this process may no longer write."""
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)
"""Errors that mean damage; any other one (too many open files, no permission) may pass."""
_HASHED_AT_ONCE = 4


@contextmanager
def storage_errors(action: str, path: Path) -> Iterator[None]:
    """Translate the operating system's errors (full disk, no permission) into StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot {action} {path}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "it is a symbolic link"
    return error.strerror or str(error)


def read_error(path: Path, error: OSError) -> CheckpointError | StorageError:
    """Return CheckpointError for a file that is missing or damaged, otherwise StorageError."""
    kind = CheckpointError if error.errno in _DAMAGE else StorageError
    return kind(f"{path}: cannot be read ({_reason(error)})")


def open_file(path: Path, mode: str) -> BinaryIO:
    """Open a file in binary mode. Raises OSError also where it is a symbolic link."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    return cast(BinaryIO, open(path, mode, opener=opener))


def read_bytes(path: Path) -> bytes:
    """Return a file's content. Raises OSError also where it is a symbolic link."""
    with open_file(path, "rb") as file:
        return file.read()


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path, check: Check | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file for writing, then fsync it, rename it and fsync its directory.

    `check` is called first, and again right before the file is renamed. The temporary file stays
    behind where writing fails.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    if check is not None:
        check()
    with storage_errors("write", path):
        with open_file(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check()
        temporary.replace(path)
        fsync_path(path.parent)


def write_atomic(path: Path, data: bytes, check: Check | None = None) -> None:
    """Replace a file's content; `check` as for `atomic_file`."""
    with atomic_file(path, check) as file:
        file.write(data)


def write_json(path: Path, value: object, check: Check | None = None) -> None:
    """Replace a file by `value` as JSON. Raises ValueError for NaN and infinity."""
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode(), check)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open_file(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def checksum(content: Mapping[str, object]) -> str:
    """Hash JSON content that carries its own checksum: with a flipped bit it may still be valid."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _walk(directory: Path) -> Iterator[Path]:
    """Yield everything below a directory. Raises OSError, which rglob would swallow."""
    with os.scandir(directory) as entries:
        for entry in entries:
            yield Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path))


def _files(directory: Path) -> list[Path]:
    """List all files but the manifest.

    Raises CheckpointError for a symbolic link: a checkpoint must not depend on files elsewhere.
    """
    try:
        paths = sorted(_walk(directory))
    except OSError as error:
        raise read_error(directory, error) from None
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
    write_manifest(temporary, facts)
    publish(temporary, final)


def write_manifest(directory: Path, facts: Mapping[str, object]) -> None:
    """Write the manifest of a finished directory once all its files are on the disk."""
    with storage_errors("commit", directory):
        files = _files(directory)
        with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
            entries = list(pool.map(_flushed, files))
        names = [str(file.relative_to(directory)) for file in files]
        content = {**facts, "files": dict(zip(names, entries, strict=True))}
        write_json(directory / MANIFEST, {**content, "checksum": checksum(content)})
        for folder in (path for path in directory.rglob("*") if path.is_dir()):
            fsync_path(folder)
        fsync_path(directory)


def _flushed(file: Path) -> JsonObject:
    """Flush a file to the disk; return its size and SHA-256."""
    fsync_path(file)
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def publish(temporary: Path, final: Path) -> None:
    """Give a directory with a manifest its final name."""
    with storage_errors("commit", final):
        temporary.rename(final)
        fsync_path(final.parent)


def verify(directory: Path, *, contents: bool = True) -> JsonObject:
    """Check every file against the manifest and return the manifest's facts.

    Files that the manifest does not list are ignored. Without `contents` only sizes are compared.

    Raises CheckpointError that names the first file that is missing or changed, and StorageError
    where one cannot be read for another reason than damage.
    """
    manifest = directory / MANIFEST
    try:
        facts: dict[str, JsonValue] = json.loads(read_bytes(manifest))
        own = facts.pop("checksum")
        expected = _expected_files(facts)
    except OSError as error:
        raise read_error(manifest, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory}: {MANIFEST} cannot be read ({error})") from None
    if own != checksum(facts):
        raise CheckpointError(f"{directory}: {MANIFEST} does not match its own checksum")
    present = {str(path.relative_to(directory)): path for path in _files(directory)}
    for name, (size, _) in expected.items():
        if name not in present:
            raise CheckpointError(f"{directory}: {name} is missing")
        actual = present[name].stat().st_size
        if actual != size:
            raise CheckpointError(
                f"{directory}: {name} has {actual} bytes, the manifest says {size}"
            )
    if contents:
        files = [present[name] for name in expected]
        for (name, (_, digest)), actual_digest in zip(
            expected.items(), _digests(files), strict=True
        ):
            if actual_digest != digest:
                raise CheckpointError(f"{directory}: {name} does not have the manifest's checksum")
    return facts


def _digests(files: Iterable[Path]) -> Iterator[str]:
    def digest(file: Path) -> str:
        try:
            return sha256(file)
        except OSError as error:
            raise read_error(file, error) from None

    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        yield from pool.map(digest, files)


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

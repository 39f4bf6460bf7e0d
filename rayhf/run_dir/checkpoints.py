"""The checkpoints of one run directory: written aside, verified before use, deleted by retention.

checkpoints/iteration-000012/            complete: its manifest lists every file, size and SHA-256
checkpoints/unhealthy-000012/            complete, of an iteration after which a guard paused the
                                         campaign; loaded only once an operator accepted it
checkpoints/.saving-000004/              being written by epoch 4; never loaded
checkpoints/.corrupt-000004-iteration-.. failed verification in epoch 4; kept for inspection,
                                         never loaded
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from rayhf.errors import CheckpointError, StorageError
from rayhf.run_dir.files import (
    MANIFEST,
    Check,
    fsync_path,
    publish,
    read_bytes,
    read_error,
    sha256,
    storage_errors,
    verify,
    write_json,
    write_manifest,
)
from rayhf.run_dir.names import iteration_name, numbered, unhealthy_name
from rayhf.run_dir.state import CheckpointState, first_problem
from rayhf.types import JsonObject

_STATE_FILE = "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint."""

    iteration: int
    directory: Path
    state: CheckpointState
    """The controller's state at the end of `iteration`."""
    facts: JsonObject
    """What its manifest says besides its files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which checkpoints to keep."""

    last: int
    """Number of newest checkpoints."""
    every: int
    """Keep multiples of this iteration; 0 for none."""
    best: bool
    """Keep the one with the highest evaluation score."""


class Checkpoints:
    """The directory `checkpoints`. Each attempt (`epoch`) writes under a name of its own.

    `check` is called before anything is written, renamed or deleted.
    """

    def __init__(self, root: Path, *, epoch: int, retention: Retention, check: Check) -> None:
        self.root = root
        self._epoch = epoch
        self._retention = retention
        self._check = check

    def begin(self) -> Path:
        """Create an empty directory to save into; nothing in it counts before `commit`.

        Raises StorageError where the disk has less space than the last checkpoint took, instead of
        failing half-way.
        """
        self._check()
        temporary = self.root / f".saving-{self._epoch:06d}"
        with storage_errors("write", temporary):
            for old in numbered(self.root, ".saving-").values():
                shutil.rmtree(old)
            temporary.mkdir()
            free = shutil.disk_usage(self.root).free
            needed = self._last_bytes()
        if free < needed:
            raise StorageError(
                f"{self.root}: {free / 2**20:,.0f} MiB are free, the last checkpoint took "
                f"{needed / 2**20:,.0f} MiB; free some space, or lower run.keep_checkpoints"
            )
        return temporary

    def _last_bytes(self) -> int:
        newest = list(numbered(self.root, "iteration-").values())[-1:]
        if not newest:
            return 0
        return sum(file.stat().st_size for file in newest[0].rglob("*") if file.is_file())

    def commit(
        self,
        temporary: Path,
        state: CheckpointState,
        facts: Mapping[str, object],
        *,
        healthy: bool = True,
    ) -> tuple[Path, str]:
        """Seal a saved checkpoint under its final name; return that and its manifest's SHA-256."""
        self._check()
        write_json(temporary / _STATE_FILE, state.model_dump(mode="json"))
        name = iteration_name if healthy else unhealthy_name
        final = self.root / name(state.iteration)
        write_manifest(temporary, {"iteration": state.iteration, "epoch": self._epoch, **facts})
        self._check()
        if final.exists():  # an attempt sealed it, crashed, and it did not verify since
            self._set_aside(final)
        publish(temporary, final)
        return final, sha256(final / MANIFEST)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint that verifies, and what is wrong with newer ones.

        Those that do not verify are set aside. Raises StorageError for one that cannot be read for
        another reason than damage: it stays.
        """
        problems: list[str] = []
        for directory in reversed(numbered(self.root, "iteration-").values()):
            try:
                return read_checkpoint(directory), problems
            except CheckpointError as error:
                problems.append(str(error))
                self._set_aside(directory)
        return None, problems

    def prune(self, best: int | None) -> None:
        """Delete what retention does not keep, and unhealthy checkpoints.

        A failure to free space must not stop training.
        """
        self._check()
        numbers = list(numbered(self.root, "iteration-"))
        keep = set(numbers[-self._retention.last :])
        if self._retention.every:
            keep |= {number for number in numbers if number % self._retention.every == 0}
        if self._retention.best and best is not None:
            keep.add(best)
        obsolete = [self.root / iteration_name(number) for number in set(numbers) - keep]
        for directory in (*obsolete, *numbered(self.root, "unhealthy-").values()):
            # Renamed first: a half-deleted directory must not look like a damaged checkpoint.
            try:
                directory.rename(self.root / f".deleting-{directory.name}")
            except OSError:
                continue
        for name in ("iteration-", "unhealthy-"):
            for directory in numbered(self.root, f".deleting-{name}").values():
                shutil.rmtree(directory, ignore_errors=True)

    def _set_aside(self, directory: Path) -> None:
        self._check()
        _rename_corrupt(directory, self._epoch)


def accept_unhealthy(directory: Path, *, epoch: int) -> Checkpoint:
    """Make an unhealthy checkpoint the campaign's newest; it stays under its iteration's name.

    Raises CheckpointError where it does not verify; it is then set aside.
    """
    final = directory.with_name(directory.name.replace("unhealthy-", "iteration-"))
    if not directory.exists() and final.exists():  # an earlier call was killed half-way
        return read_checkpoint(final)
    try:
        read_checkpoint(directory)
    except CheckpointError:
        if directory.exists():
            _rename_corrupt(directory, epoch)
        raise
    with storage_errors("rename", directory):
        directory.rename(final)
        fsync_path(final.parent)
    return read_checkpoint(final)


def _rename_corrupt(directory: Path, epoch: int) -> None:
    with storage_errors("set aside", directory):
        directory.rename(directory.with_name(f".corrupt-{epoch:06d}-{directory.name}"))


def read_checkpoint(directory: Path, *, contents: bool = True) -> Checkpoint:
    """Verify and read a checkpoint; without `contents`, only the sizes of its files.

    Raises CheckpointError unless every file is as the manifest says, and StorageError where one
    cannot be read for another reason than damage.
    """
    facts = verify(directory, contents=contents)
    iteration = facts.get("iteration")
    if not isinstance(iteration, int) or directory.name not in (
        iteration_name(iteration),
        unhealthy_name(iteration),
    ):
        raise CheckpointError(f"{directory}: its manifest is that of iteration {iteration}")
    try:
        state = CheckpointState.model_validate_json(read_bytes(directory / _STATE_FILE))
    except ValidationError as error:
        problem = first_problem(error)
        raise CheckpointError(f"{directory}: {_STATE_FILE} cannot be read{problem}") from None
    except OSError as error:
        raise read_error(directory / _STATE_FILE, error) from None
    return Checkpoint(iteration=iteration, directory=directory, state=state, facts=facts)

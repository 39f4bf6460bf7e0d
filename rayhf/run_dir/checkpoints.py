"""The checkpoints of one run directory: written aside, verified before use, deleted by retention.

checkpoints/iteration-000012/            complete: its manifest lists every file, size and SHA-256
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
    iteration_name,
    iteration_of,
    seal,
    sha256,
    storage_errors,
    verify,
    write_json,
)
from rayhf.run_dir.state import CheckpointState, first_problem

_STATE_FILE = "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint."""

    iteration: int
    directory: Path
    state: CheckpointState
    """The controller's state at the end of `iteration`."""


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
    """The directory `checkpoints`. Each attempt (`epoch`) writes under a name of its own."""

    def __init__(self, root: Path, *, epoch: int, retention: Retention) -> None:
        self.root = root
        self._epoch = epoch
        self._retention = retention

    def begin(self) -> Path:
        """Create an empty directory to save into; nothing in it counts before `commit`.

        Raises StorageError where the disk has less space than the last checkpoint took, instead of
        failing half-way.
        """
        temporary = self.root / f".saving-{self._epoch:06d}"
        with storage_errors("write", temporary):
            for old in self.root.glob(".saving-*"):
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
        newest = max(self.root.glob("iteration-*"), default=None)
        if newest is None:
            return 0
        return sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())

    def commit(
        self, temporary: Path, state: CheckpointState, facts: Mapping[str, object]
    ) -> tuple[Path, str]:
        """Seal a saved checkpoint under its final name; return that and its manifest's SHA-256."""
        write_json(temporary / _STATE_FILE, state.model_dump(mode="json"))
        final = self.root / iteration_name(state.iteration)
        if final.exists():  # an attempt sealed it, crashed, and it did not verify since
            self._set_aside(final)
        seal(temporary, final, {"iteration": state.iteration, "epoch": self._epoch, **facts})
        return final, sha256(final / MANIFEST)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint that verifies, and what is wrong with newer ones.

        Those that do not verify are set aside.
        """
        problems: list[str] = []
        for directory in sorted(self.root.glob("iteration-*"), reverse=True):
            try:
                return read_checkpoint(directory), problems
            except CheckpointError as error:
                problems.append(str(error))
                self._set_aside(directory)
        return None, problems

    def prune(self, best: int | None) -> None:
        """Delete what retention does not keep. A failure to free space must not stop training."""
        numbers = sorted(map(iteration_of, self.root.glob("iteration-*")))
        keep = set(numbers[-self._retention.last :])
        if self._retention.every:
            keep |= {number for number in numbers if number % self._retention.every == 0}
        if self._retention.best and best is not None:
            keep.add(best)
        for number in set(numbers) - keep:
            # Renamed first: a half-deleted directory must not look like a damaged checkpoint.
            name = iteration_name(number)
            try:
                (self.root / name).rename(self.root / f".deleting-{name}")
            except OSError:
                continue
        for directory in self.root.glob(".deleting-*"):
            shutil.rmtree(directory, ignore_errors=True)

    def _set_aside(self, directory: Path) -> None:
        with storage_errors("set aside", directory):
            directory.rename(directory.with_name(f".corrupt-{self._epoch:06d}-{directory.name}"))


def read_checkpoint(directory: Path) -> Checkpoint:
    """Verify and read a checkpoint.

    Raises CheckpointError unless every file is as the manifest says.
    """
    iteration = verify(directory).get("iteration")
    if not isinstance(iteration, int) or directory.name != iteration_name(iteration):
        raise CheckpointError(f"{directory}: its manifest is that of iteration {iteration}")
    try:
        state = CheckpointState.model_validate_json((directory / _STATE_FILE).read_bytes())
    except ValidationError as error:
        problem = first_problem(error)
        raise CheckpointError(f"{directory}: {_STATE_FILE} cannot be read{problem}") from None
    except OSError as error:
        raise CheckpointError(f"{directory}: {_STATE_FILE} cannot be read ({error})") from None
    return Checkpoint(iteration=iteration, directory=directory, state=state)

"""The checkpoints of one run directory: sealed as a whole, verified before they are trusted,
thinned out by retention.

checkpoints/iteration-000012/            sealed: its manifest lists every file with size and SHA-256
checkpoints/.saving-000004/              being written by epoch 4; worth nothing
checkpoints/.corrupt-000004-iteration-.. did not verify when epoch 4 looked: set aside for a person,
never loaded
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayhf.errors import CheckpointError, StorageError
from rayhf.run_dir.files import MANIFEST, seal, sha256, storage_errors, verify, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint."""

    iteration: int
    directory: Path
    state: Mapping[str, Any]
    """The controller's state at the end of `iteration`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which checkpoints stay: the newest `last`, every `every`-th round's (0: none), and the
    best."""

    last: int
    every: int
    best: bool


class Checkpoints:
    """The folder `checkpoints`. `epoch` is the number of this attempt at the campaign: each writes
    under its own name."""

    def __init__(self, root: Path, *, epoch: int, retention: Retention) -> None:
        self.root, self._epoch, self._retention = root, epoch, retention

    def begin(self) -> Path:
        """An empty directory to save into; nothing counts until `commit`.

        Raises StorageError where the disk has not even the room that the last checkpoint took:
        better now than half-way.
        """
        temporary = self.root / f".saving-{self._epoch:06d}"
        with storage_errors("write", temporary):
            for old in self.root.glob(".saving-*"):
                shutil.rmtree(old)
            temporary.mkdir()
            free, needed = shutil.disk_usage(self.root).free, self._last_bytes()
        if free < needed:
            raise StorageError(
                f"{self.root}: {free / 2**20:,.0f} MiB are free, the last checkpoint took {needed / 2**20:,.0f} MiB; "
                "free some space, or lower run.keep_checkpoints"
            )
        return temporary

    def _last_bytes(self) -> int:
        newest = max(self.root.glob("iteration-*"), default=None)
        return (
            sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
            if newest
            else 0
        )

    def commit(
        self, temporary: Path, iteration: int, state: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> tuple[Path, str]:
        """Seal what was saved under its final name. Returns it, and the SHA-256 of its manifest."""
        write_json(temporary / "state.json", dict(state))
        final = self.root / directory_name(iteration)
        if (
            final.exists()
        ):  # sealed by an attempt that died before it could say so, and not found valid since
            self._set_aside(final)
        seal(temporary, final, {"iteration": iteration, "epoch": self._epoch, **facts})
        return final, sha256(final / MANIFEST)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, and what was wrong with newer ones, which are set
        aside."""
        problems: list[str] = []
        for directory in sorted(self.root.glob("iteration-*"), reverse=True):
            try:
                return read_checkpoint(directory), problems
            except CheckpointError as error:
                problems.append(str(error))
                self._set_aside(directory)
        return None, problems

    def prune(self, best: int | None) -> None:
        """Delete what retention no longer keeps. Failing to free space must not stop training."""
        numbers = sorted(
            int(p.name.removeprefix("iteration-")) for p in self.root.glob("iteration-*")
        )
        keep = set(numbers[-self._retention.last :])
        if self._retention.every:
            keep |= {n for n in numbers if n % self._retention.every == 0}
        if self._retention.best and best is not None:
            keep.add(best)
        for number in set(numbers) - keep:
            # Renamed first: a half-deleted directory must not look like a damaged checkpoint.
            doomed = self.root / f".deleting-{directory_name(number)}"
            try:
                (self.root / directory_name(number)).rename(doomed)
            except OSError:
                continue
        for doomed in self.root.glob(".deleting-*"):
            shutil.rmtree(doomed, ignore_errors=True)

    def _set_aside(self, directory: Path) -> None:
        with storage_errors("set aside", directory):
            directory.rename(directory.with_name(f".corrupt-{self._epoch:06d}-{directory.name}"))


def directory_name(iteration: int) -> str:
    return f"iteration-{iteration:06d}"


def read_checkpoint(directory: Path) -> Checkpoint:
    """Raises CheckpointError unless every file is as the manifest says."""
    facts = verify(directory)
    try:
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        if directory.name != directory_name(facts["iteration"]):
            raise CheckpointError(
                f"{directory}: its manifest is that of round {facts['iteration']}"
            )
        return Checkpoint(iteration=facts["iteration"], directory=directory, state=state)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory}: its state cannot be read ({error})") from None

"""Past policies of a campaign: exported models that later iterations compute log-probs with.

population/iteration-000012/   the policy after iteration 12 (0: the initial one) as a Hugging Face
                               model; complete once it has its manifest

Retention: the policies that the iterations after the newest one, and after every checkpoint that is
kept, read. A campaign that continues from an older checkpoint therefore finds its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from rayhf.config.algorithms import PopulationConfig
from rayhf.errors import CheckpointError
from rayhf.run_dir.files import Check, publish, storage_errors, verify, write_manifest
from rayhf.run_dir.names import iteration_name, numbered

FOLDER = "population"


class PastPolicies:
    """The directory `population`. `check` is called before anything is written or deleted."""

    def __init__(
        self, run: Path, population: PopulationConfig, *, epoch: int, check: Check
    ) -> None:
        self.root = run / FOLDER
        self.population = population
        self._epoch = epoch
        self._check = check

    def begin(self) -> Path:
        """Create an empty directory to export a policy into; `add` moves it into place."""
        self._check()
        temporary = self.root / f".saving-{self._epoch:06d}"
        with storage_errors("write", temporary):
            for old in numbered(self.root, ".saving-").values():
                shutil.rmtree(old)
            temporary.mkdir(parents=True)
        return temporary

    def add(self, temporary: Path, iteration: int) -> None:
        """Seal the policy after `iteration`. Reads all its files: call it in a thread."""
        self._check()
        write_manifest(temporary, {"iteration": iteration, "epoch": self._epoch})
        self._check()
        final = self.root / iteration_name(iteration)
        with storage_errors("replace", final):
            shutil.rmtree(final, ignore_errors=True)
        publish(temporary, final)

    def read_by(self, iteration: int) -> list[Path]:
        """Return the policies that an iteration reads, newest first.

        Raises CheckpointError for one that is missing or damaged; only sizes are compared.
        """
        return self._verified(self.population.read_by(iteration), contents=False)

    def check_kept(self, iteration: int) -> None:
        """Compare every byte of what a campaign reads that continues after `iteration`.

        Raises CheckpointError for a policy that is missing or damaged.
        """
        self._verified(self.population.kept(iteration), contents=True)

    def _verified(self, numbers: Iterable[int], *, contents: bool) -> list[Path]:
        directories = [self.root / iteration_name(number) for number in numbers]
        for directory in directories:
            try:
                verify(directory, contents=contents)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error}; the loop plays against this past policy: restore it from a copy"
                ) from None
        return directories

    def prune(self, after: Iterable[int]) -> None:
        """Delete what no iteration after one of `after` reads."""
        keep = {number for last in after for number in self.population.kept(last)}
        self._delete(number for number in numbered(self.root, "iteration-") if number not in keep)

    def rewind(self, iteration: int) -> None:
        """Delete the policies after later iterations than this: they will be repeated."""
        self._delete(number for number in numbered(self.root, "iteration-") if number > iteration)

    def _delete(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._check()
            shutil.rmtree(self.root / iteration_name(number), ignore_errors=True)

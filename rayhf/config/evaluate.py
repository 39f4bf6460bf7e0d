"""The config of `rayhf eval`. A docstring under a field is its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from rayhf.config.base import Name, Section
from rayhf.config.registry import SUITES
from rayhf.config.schema import Fraction, PolicyConfig, RolloutConfig
from rayhf.config.scorers import ScorerEntries
from rayhf.config.suites import SuiteConfig


class BestOfConfig(Section):
    """A curve of over-optimization: the best of n samples by a proxy, measured by a judge."""

    proxy: ScorerEntries
    """Scorers that choose, combined by weighted sum: the reward model in question."""
    judge: ScorerEntries
    """Held-out scorers that measure, combined by weighted sum."""
    sizes: tuple[PositiveInt, ...] = ()
    """Values of n. Default: powers of 2 up to the number of samples."""


class EvalConfig(Section):
    """Suites, sampling, and what the answers are compared with."""

    policy: PolicyConfig
    """The model, and how its chat template is used."""
    rollout: RolloutConfig = RolloutConfig()
    """Engine and sampling."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device of all models."""
    suites: dict[Name, Annotated[SuiteConfig, SUITES]] = Field(min_length=1)
    """Suites by the name of their results."""
    samples: PositiveInt = 1
    """Completions per prompt and seed."""
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0,), min_length=1)
    """Seeds; each gives `samples` completions of every prompt."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature; 0 is greedy, with one sample. Default: rollout.temperature."""
    k: tuple[PositiveInt, ...] = ()
    """Values of k for pass@k and maj@k. Default: powers of 2 up to the completions per prompt."""
    scorer: ScorerEntries | None = None
    """Scorers of suites without their own; for a suite of preference pairs, what is measured.
    Default: none; for preference pairs MODEL as a reward model."""
    baseline: str | None = None
    """What the answers are compared with: a model, RUN@iteration, or a file of answers."""
    judge: ScorerEntries | None = None
    """Scorers that compare answers with the baseline's for a win rate, pairwise or not."""
    best_of: BestOfConfig | None = None
    """Curve of over-optimization. Default: none."""
    max_failed: Fraction = 0.1
    """Share of completions that may stay without a score before the evaluation is refused."""
    out: Path = Path("evals")
    """Directory for results and answers."""

    @property
    def completions(self) -> int:
        """Completions per prompt."""
        return self.samples * len(self.seeds)

    @property
    def sizes(self) -> tuple[int, ...]:
        """`k`, or its default."""
        return self.k or powers_of_two(self.completions)

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.temperature == 0 and self.completions > 1:
            raise ValueError(
                f"samples x seeds is {self.completions} at temperature 0, which would be the same "
                "completion each time; expected 1, or a temperature above 0"
            )
        if max(self.sizes) > self.completions:
            raise ValueError(
                f"k is {max(self.sizes)}, and there are {self.completions} completions per prompt "
                "(samples x seeds)"
            )
        if self.best_of and max(self.best_of.sizes, default=1) > self.completions:
            raise ValueError(
                f"best_of.sizes has {max(self.best_of.sizes)}, and there are {self.completions} "
                "completions per prompt (samples x seeds)"
            )
        if self.judge is not None and self.baseline is None:
            raise ValueError("judge compares with a baseline, and there is none; set baseline")
        return self


def powers_of_two(limit: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... up to `limit`, which is the last one in any case."""
    powers = [1]
    while powers[-1] * 2 <= limit:
        powers.append(powers[-1] * 2)
    return tuple(powers if powers[-1] == limit else [*powers, limit])

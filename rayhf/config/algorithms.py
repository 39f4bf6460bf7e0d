"""Config parts that algorithms share: base class, reference schedules, importance, offline pairs.

The config of each algorithm is beside its code (rayhf/algorithms/*.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rayhf.config.base import PluginConfig, Section
from rayhf.errors import ConfigError

if TYPE_CHECKING:
    from rayhf.config.schema import CampaignConfig
    from rayhf.types import Prompt


class AlgorithmConfig(PluginConfig):
    """Settings of an algorithm; the defaults are those of its source."""

    trains_at_sampling_temperature: ClassVar[bool] = False
    """Whether log-probs are those of the policy at rollout.temperature, which an estimate of its
    gradient or its KL from its own samples needs. False: those at temperature 1, which evaluations
    sample from (as RLHFlow and SPPO's code)."""

    plays_episodes: ClassVar[bool] = True
    """Whether an environment may answer its completions: it then draws them by `context.sample`
    from the prompt itself, and trains on them whole, or by `context.play_on`, turn by turn."""

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse settings of other sections that contradict these. Raises ConfigError."""

    def for_calibration(self) -> Self:
        """Return the setting in which every learner trains from the first iteration on."""
        return self

    def check_prompts(self, campaign: CampaignConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse training prompts that are too few or lack a column. Raises ConfigError."""


def refuse_thinking(campaign: CampaignConfig, reason: str) -> None:
    """Raise ConfigError for a campaign that splits completions into thinking and answer."""
    if campaign.rollout.thinking is not None:
        raise ConfigError(
            f"rollout.thinking: {campaign.algorithm.type} does not take thinking models: {reason}; "
            "leave it out, and set policy.chat_template_kwargs where the model can answer without "
            "thinking"
        )


def refuse_staleness(campaign: CampaignConfig, reason: str) -> None:
    """Raise ConfigError for a campaign that trains on samples of earlier weights."""
    if campaign.run.max_staleness:
        raise ConfigError(
            f"run.max_staleness is {campaign.run.max_staleness}, but {campaign.algorithm.type} "
            f"{reason}; expected 0"
        )


def require_win_rates(campaign: CampaignConfig) -> None:
    """Raise ConfigError for a scorer without win rates of all completions against each other."""
    for index, entry in enumerate(campaign.scorer.train):
        if entry.comparisons is not None and not entry.comparisons.gives_win_rates:
            raise ConfigError(
                f"scorer.train[{index}].comparisons is {entry.comparisons.type}, but "
                f"{campaign.algorithm.type} regresses onto each completion's win rate against the "
                "policy's own; expected round_robin or swiss"
            )


def refuse_pairwise(campaign: CampaignConfig, reason: str) -> None:
    """Raise ConfigError for a scorer without a score for a single completion."""
    for index, entry in enumerate(campaign.scorer.train):
        if entry.is_pairwise:
            raise ConfigError(
                f"scorer.train[{index}]: {entry.resolved_name} compares completions, but "
                f"{campaign.algorithm.type} {reason}; expected a scorer of single completions, or "
                "comparisons: {type: anchors}"
            )


class InitialReference(Section):
    """Reference fixed at the campaign's initial policy."""

    type: Literal["initial"] = "initial"

    @property
    def moves(self) -> bool:
        """Whether the reference ever takes new weights."""
        return False

    @property
    def is_learner(self) -> bool:
        """Whether the reference is the learner before its first step: then no copy is needed."""
        return False

    @property
    def averages(self) -> bool:
        """Whether the reference is an average, which is kept in float32."""
        return False

    def mix(self, iteration: int, steps: int) -> float | None:
        """Return the share of the new weights that the reference takes; None: it keeps its own.

        `steps` are planned optimizer steps per iteration.
        """
        return None


class PreviousReference(Section):
    """Reference replaced by the current policy every `every` iterations."""

    type: Literal["previous"] = "previous"
    every: PositiveInt = 1
    """Iterations between refreshes."""

    @property
    def moves(self) -> bool:
        """Whether the reference ever takes new weights."""
        return True

    @property
    def is_learner(self) -> bool:
        """Whether the reference is the learner before its first step: then no copy is needed."""
        return self.every == 1

    @property
    def averages(self) -> bool:
        """Whether the reference is an average, which is kept in float32."""
        return False

    def mix(self, iteration: int, steps: int) -> float | None:
        """Return the share of the new weights that the reference takes; None: it keeps its own.

        `steps` are planned optimizer steps per iteration.
        """
        return None if iteration % self.every else 1.0


class EmaReference(Section):
    """Moving average of the policy (Gorbatovski et al. 2024, TR-DPO, eq. 3).

    reference <- alpha * policy + (1 - alpha) * reference.
    """

    type: Literal["ema"] = "ema"
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the new weights (TR-DPO)."""
    every: PositiveInt = 512
    """Optimizer steps between updates (TR-DPO), as planned: learner.epochs * prompts.batch /
    learner.prompts_per_step per iteration. An update is at the end of an iteration, at most one in
    each."""

    @property
    def moves(self) -> bool:
        """Whether the reference ever takes new weights."""
        return True

    @property
    def is_learner(self) -> bool:
        """Whether the reference is the learner before its first step: then no copy is needed."""
        return False

    @property
    def averages(self) -> bool:
        """Whether the reference is an average, which is kept in float32."""
        return True

    def mix(self, iteration: int, steps: int) -> float | None:
        """Return the share of the new weights that the reference takes; None: it keeps its own.

        `steps` are planned optimizer steps per iteration.
        """
        is_due = iteration * steps // self.every > (iteration - 1) * steps // self.every
        return self.alpha if is_due else None


ReferenceSchedule = Annotated[
    InitialReference | PreviousReference | EmaReference, Field(discriminator="type")
]


class PopulationConfig(Section):
    """Policies of earlier iterations, besides the one that an iteration starts with.

    They are kept in the run directory (population/), the initial policy as that after iteration 0.
    """

    size: NonNegativeInt = 1
    """Largest number of them; early iterations have fewer. Each costs a copy of the weights on the
    disk and, as long as its log-probs are computed, one in the memory of the reference."""
    every: PositiveInt = 1
    """Iterations between two of them."""

    def read_by(self, iteration: int) -> list[int]:
        """Return after which iterations the policies were that an iteration reads, newest first."""
        return self._newest(iteration - 2)

    def kept(self, iteration: int) -> list[int]:
        """Return those up to `iteration` that any later iteration reads, newest first."""
        return self._newest(iteration) + self._newest(iteration - 1)[-1:]

    def is_due(self, iteration: int) -> bool:
        """Whether the policy after an iteration belongs to the population."""
        return self.size > 0 and iteration % self.every == 0

    def _newest(self, last: int) -> list[int]:
        newest = last - last % self.every
        return list(range(newest, -1, -self.every))[: self.size]


class ImportanceConfig(Section):
    """Truncated importance weights exp(log p_learner - log p_rollout).

    They correct for staleness and for the mismatch between rollout engine and learner.
    """

    cap: Annotated[float, Field(ge=1)] | None = 2.0
    """Upper truncation (verl's rollout correction default); null turns the correction off. At least
    1: less would shrink on-policy weights."""


class PolicyImportanceConfig(ImportanceConfig):
    """Importance weights of tokens exp(log p_learner - log p_rollout), bounded or masked.

    They correct for staleness and for the mismatch between rollout engine and learner.
    """

    kind: Literal["truncate", "mask"] = "truncate"
    """truncate: a weight above `cap` becomes `cap` (Yao et al. 2025). mask: a weight above `cap` or
    below `floor` becomes 0, so that its tokens do not train (IcePop, Ling Team 2025)."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """What has a weight of its own: a token, or a whole completion. sequence is the product over
    its tokens, which is exact and, for long completions, soon bounded or masked; geometric is the
    product's mean per token."""
    floor: PositiveFloat | None = None
    """Smallest weight that mask keeps (IcePop: 0.5, with cap 5). Default: 1 / cap."""

    @property
    def smallest(self) -> float:
        """`floor`, or its default."""
        return self.floor if self.floor is not None else 1 / (self.cap or 1.0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.floor is not None and (self.kind != "mask" or self.cap is None or self.floor > 1):
            raise ValueError(
                f"floor {self.floor:g} is the smallest weight that kind: mask keeps; expected at "
                "most 1, with kind: mask and a cap"
            )
        return self


class RefillConfig(Section):
    """Further prompts in place of those whose groups teach nothing (DAPO's dynamic sampling)."""

    budget: Annotated[float, Field(ge=1)] = 1.0
    """Prompts that an iteration may explore, as a multiple of prompts.batch, in all. 1 is off."""


class OfflineConfig(Section):
    """Preference pairs from a file."""

    path: Path
    """JSONL or Parquet with `prompt` or `messages`, `chosen`, `rejected`."""
    share: PositiveFloat = 1.0
    """Offline pairs per iteration, as a share of prompts.batch."""

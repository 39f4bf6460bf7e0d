"""Settings that all scorers share, and how several scorers become one.

The settings of each scorer stand beside its code (rayhf/scorer/); `type` names it. Everything that
the planner, the preflight checks and the service must know of a scorer is a fact that its settings
declare: `compares`, `is_pairwise`, `is_normalized`, `curriculum`, `is_concurrent`, `uses_gpu`,
`runs_engine`, `loads`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveInt, model_validator

from rayhf.config.base import Name, PluginConfig, Section
from rayhf.config.comparisons import Anchors, Comparisons
from rayhf.config.models import ModelName
from rayhf.config.registry import SCORERS

if TYPE_CHECKING:
    from rayhf.config.schema import RolloutConfig

Dtype = Literal["float32", "bfloat16"]
ScorerKind = Literal["pointwise", "pairwise", "general_preference"]
"""What a fitted scorer reads and returns (rayhf/scorer/fit.py)."""

_PART_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierModel:
    """A sequence classifier in a scorer's process, as memory estimates see it."""

    model: ModelName
    dtype: Dtype
    token_budget: int
    """Padded tokens per forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """A language model in a vLLM engine in a scorer's process, as memory estimates see it."""

    model: ModelName
    dtype: Dtype
    engine: RolloutConfig


class LogSigmoid(Section):
    """u = log sigmoid(score - reference), with diminishing returns above the reference.

    Sums of such terms mean "good in all of them". Wang et al. 2024 (2402.00742), LSC: the paper
    takes one reference per prompt, the 0.85 quantile of the scores of SFT completions; here it is
    one number for all prompts, which you measure.
    """

    type: Literal["log_sigmoid"] = "log_sigmoid"
    reference: float
    """Score from which a completion counts as good, for example the 0.85 quantile of an SFT
    model's scores."""

    def apply(self, score: float) -> float:
        """Return the transformed score, stable for any finite score."""
        margin = score - self.reference
        if margin >= 0:
            return -math.log1p(math.exp(-margin))
        return margin - math.log1p(math.exp(margin))


class CurriculumConfig(Section):
    """Weights of a score's parts that follow how often the policy meets them.

    A part that all completions meet, or none, distinguishes none of them. Its weight is multiplied
    by max(smallest, 4 p (1 - p)), p being its mean over the policy's completions so far: the
    variance of a yes/no answer, scaled to 1 at p = 1/2. DR Tulu (Shao et al. 2025, 2511.19399)
    drops a prompt's criteria of zero variance and keeps those of the largest; weights, and one p
    for all prompts, are ours.
    """

    smallest: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Smallest factor, of a part that is always met or never. 1: all factors are 1 (ours)."""
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """p becomes memory * p + (1 - memory) * the iteration's mean; it begins at 1/2 (ours)."""


class ScorerEntryConfig(PluginConfig):
    """Settings and declared facts of any scorer.

    Derive from PointwiseEntryConfig or PairwiseEntryConfig.
    """

    name: Name | None = None
    """Name in metrics and samples. Default: the function's or the class's name, or the type."""
    weight: float = 1.0
    text: Literal["final", "whole"] = "final"
    """What it reads of a thinking model's completion: the final answer, or the thinking as well."""
    comparisons: Comparisons | None = None
    """Of a scorer that compares: which pairs of a prompt's completions it is asked about
    (rayhf/config/comparisons.py). Default: all."""

    @property
    def default_name(self) -> str:
        """Name where the config gives none."""
        return self.type.rpartition(":")[2]

    @property
    def resolved_name(self) -> str:
        """Name in metrics and samples."""
        return self.default_name if self.name is None else self.name

    @property
    def compares(self) -> bool:
        """Whether it reads two completions at a time."""
        return False

    @property
    def is_pairwise(self) -> bool:
        """Whether it compares a prompt's completions, with no score for a single completion."""
        return self.compares and not isinstance(self.comparisons, Anchors)

    @property
    def calls_per_comparison(self) -> int:
        """Calls of a judge that one comparison takes."""
        return 1

    @property
    def is_normalized(self) -> bool:
        """Whether its scores are normalized by statistics of the campaign so far."""
        return False

    @property
    def curriculum(self) -> CurriculumConfig | None:
        """How the weights of its score's parts follow the policy; None: they do not."""
        return None

    @property
    def part_weights(self) -> Mapping[str, float]:
        """Weights of the score's parts, for a curriculum; below 0 for parts to avoid."""
        return {}

    @property
    def is_concurrent(self) -> bool:
        """Whether several calls may run at the same time, in threads."""
        return False

    @property
    def loads(self) -> ClassifierModel | EngineModel | None:
        """The model in its process, for memory estimates; None where there is none to estimate."""
        return None

    @property
    def reply_bytes(self) -> int:
        """Most that a run keeps of its words about one completion, for the estimate of disk."""
        return 0

    @property
    def uses_gpu(self) -> bool:
        """Whether it needs a GPU where the cluster has them."""
        return self.loads is not None

    @property
    def runs_engine(self) -> bool:
        """Whether it runs vLLM in its process, which needs rayhf.rollout.env.engine_env()."""
        return isinstance(self.loads, EngineModel)

    def transformed(self, score: float) -> float:
        """Return the score after the configured transform."""
        return score

    @model_validator(mode="after")
    def _check_comparisons(self) -> Self:
        if self.comparisons is not None and not self.compares:
            raise ValueError(
                f"comparisons is for a scorer that compares completions, and {self.resolved_name} "
                "scores each by itself; leave it out"
            )
        return self


class PointwiseEntryConfig(ScorerEntryConfig):
    """Settings of a scorer that scores each completion by itself."""

    transform: LogSigmoid | None = None
    """Applied to each score first."""
    normalize: bool = False
    """(score - mean) / standard deviation, both over all scores of this campaign so far; applied
    after the transform."""

    @property
    def is_normalized(self) -> bool:
        """Whether its scores are normalized by statistics of the campaign so far."""
        return self.normalize

    def transformed(self, score: float) -> float:
        """Return the score after the configured transform."""
        return score if self.transform is None else self.transform.apply(score)


class PairwiseEntryConfig(ScorerEntryConfig):
    """Settings of a scorer that compares the completions of one prompt."""

    @property
    def compares(self) -> bool:
        """Whether it reads two completions at a time."""
        return True


ScorerEntry = Annotated[ScorerEntryConfig, SCORERS]
"""One scorer: a built-in `type`, one of an installed package, or package.module:Class."""


def _check_names(entries: tuple[ScorerEntryConfig, ...]) -> tuple[ScorerEntryConfig, ...]:
    names = [entry.resolved_name for entry in entries]
    for index, name in enumerate(names):
        if not _PART_NAME.fullmatch(name):
            raise ValueError(
                f"entry {index} is named {name!r}; letters, digits, '_', '.' and '-' are allowed, "
                "set `name`"
            )
        first = names.index(name)
        if first != index:
            raise ValueError(
                f"entries {first} and {index} are both named {name!r}; set `name` on one of them"
            )
    return entries


def names_of(entries: Sequence[ScorerEntryConfig]) -> tuple[str, ...]:
    """Return the entries' names, which a row may give as its scorers."""
    return tuple(entry.resolved_name for entry in entries)


ScorerEntries = Annotated[
    tuple[ScorerEntry, ...], Field(min_length=1), AfterValidator(_check_names)
]
"""Scorers that are combined, with different names."""


class CombineConfig(Section):
    """How the entries' scores become one.

    weighted_sum: sum_i w_i u_i. mean: sum_i w_i u_i / sum_i w_i. worst: min_i u_i. uncertainty: the
    mean minus coef times the weighted variance around it. The last two are Coste et al. 2023
    (2310.02743), worst-case and uncertainty-weighted optimization.
    """

    type: Literal["weighted_sum", "mean", "worst", "uncertainty"] = "weighted_sum"
    coef: NonNegativeFloat = 0.1
    """Weight of the variance (uncertainty only). Coste et al.: 0.1 for PPO, 0.5 to 1 for
    best-of-n."""


WEIGHTED_SUM = CombineConfig()


class CombinedScorersConfig(Section):
    """Scorers that are combined into one."""

    train: ScorerEntries
    """Combined, they are the score."""
    combine: CombineConfig = WEIGHTED_SUM
    """How `train` is combined; evaluation takes weighted sums."""
    threads: PositiveInt | None = None
    """CPU threads of the scorers' models. Default: derived from the machine."""

    @model_validator(mode="after")
    def _check_weights(self) -> CombinedScorersConfig:
        """Refuse weights without a meaning in this combination."""
        weights = [entry.weight for entry in self.train]
        pairwise = any(entry.is_pairwise for entry in self.train)
        combine = self.combine.type
        if pairwise and combine not in ("weighted_sum", "mean"):
            raise ValueError(
                f"combine.type {combine} is for scores, and a pairwise scorer gives win "
                "probabilities; expected weighted_sum or mean"
            )
        if combine == "worst" and any(weight != 1 for weight in weights):
            raise ValueError(
                "combine.type worst takes the smallest score as it is; expected no weights, got "
                + _list(weights)
            )
        if (pairwise or combine != "weighted_sum") and any(weight <= 0 for weight in weights):
            reason = "a pairwise scorer" if pairwise else f"combine.type {combine}"
            raise ValueError(
                f"weights are {_list(weights)}; with {reason} they are shares, expected numbers "
                "above 0"
            )
        return self


def _list(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:g}" for weight in weights)


class ScorerConfig(CombinedScorersConfig):
    """The campaign's scorers."""

    train: ScorerEntries = ()
    """Combined, they are the score. Empty only where nothing is generated for training."""
    evaluate: ScorerEntries | None = None
    """For held-out evaluation only. Default: the training scorers."""
    max_failed: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of an iteration's completions that may be Failed or Invalid before the run stops."""
    in_flight: PositiveInt = 8
    """Calls of the training scorers in flight, where all of them take several at a time (rules,
    judges and services behind an endpoint) and none is normalized; otherwise calls follow each
    other, with all that waits in one call."""
    replicas: PositiveInt = 1
    """Actors of the training scorers; the completions of a call are divided among them."""
    attempts: PositiveInt = 4
    """Maximum number of calls for a completion whose scorer is unreachable. A scorer that responds
    to nothing pauses the campaign until it is back."""

    @property
    def calls_in_flight(self) -> int:
        """Calls of the training scorers that may be in flight at a time."""
        several = all(entry.is_concurrent and not entry.is_normalized for entry in self.train)
        return self.in_flight if several else 1

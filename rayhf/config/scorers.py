"""What judges answers: one entry class per kind of scorer, and how several become one. A docstring
under a field is its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rayhf.config.base import Name, Section
from rayhf.config.service import NO_SECURITY, EndpointSecurity, split_endpoint

Dtype = Literal["float32", "bfloat16"]


class LogSigmoid(Section):
    """u = log sigmoid(r - reference): little is won by an answer that is already good. Wang et al.
    2024 (2402.00742), LSC.

    Sums of such terms mean "good in all of them". The paper takes one reference per prompt, the
    0.85 quantile of the scores of SFT answers to it; here it is one number for all prompts, which
    you measure and write down.
    """

    type: Literal["log_sigmoid"] = "log_sigmoid"
    reference: float
    """The score from which an answer counts as good, for example the 0.85 quantile of an SFT
    model's scores."""


class Entry(Section):
    """What every scorer has."""

    name: Name | None = None
    """In metrics and samples. Default: the function's name, or the type."""
    weight: float = 1.0


class PointwiseEntry(Entry):
    """A scorer that gives each answer a number."""

    transform: LogSigmoid | None = None
    """Of each score, before anything else."""
    normalize: bool = False
    """(score - mean) / standard deviation, both over everything this campaign has scored so far;
    after the transform."""


class RuleConfig(PointwiseEntry):
    """A function of yours: `module:function(completion, *, prompt, answer, finish_reason) ->
    float`."""

    type: Literal["rule"] = "rule"
    function: str
    timeout_s: PositiveFloat = 10.0
    """Per completion, in seconds."""
    network: bool = False
    """It asks a service. Otherwise its process gets no network where the kernel allows that."""


class RewardModelConfig(PointwiseEntry):
    """A sequence classifier with one output, with its own tokenizer and chat template."""

    type: Literal["reward_model"] = "reward_model"
    model: Path
    dtype: Dtype = "float32"
    token_budget: PositiveInt = 16384
    """Padded tokens per forward pass."""
    max_length: PositiveInt | None = None


class PairwiseRuleConfig(Entry):
    """A function of yours: `module:function(first, second, *, prompt, answer) -> float`, the
    probability that first is better.

    It is asked once for each two answers to a prompt, the earlier one first; the other direction is
    one minus that.
    """

    type: Literal["pairwise_rule"] = "pairwise_rule"
    function: str
    timeout_s: PositiveFloat = 10.0
    """Per pair, in seconds."""
    network: bool = False
    """As for rule."""


class PreferenceModelConfig(Entry):
    """A preference model that `rayhf fit-scorer` wrote: it compares answers by itself and need not
    be transitive."""

    type: Literal["preference_model"] = "preference_model"
    model: Path
    dtype: Dtype = "float32"
    token_budget: PositiveInt = 16384
    """Padded tokens per forward pass."""
    max_length: PositiveInt | None = None


class JudgeConfig(PointwiseEntry):
    """A language model that is asked for a verdict.

    yes_no: the share of yes among its votes. rating: the mean of its votes from 1 to 10. pairwise:
    the share of votes that an answer wins against another, both shown first in turn. A vote that
    cannot be read does not count, in either direction.
    """

    type: Literal["judge"] = "judge"
    model: Path
    """Hugging Face model directory with a tokenizer that has a chat template."""
    mode: Literal["yes_no", "rating", "pairwise"] = "yes_no"
    votes: PositiveInt = 1
    """Per question; in pairwise mode per order. SPaR (Cheng et al. 2024) asks 5 times at
    temperature 0.7."""
    temperature: NonNegativeFloat = 0.0
    """0 is greedy, and then one vote is all there is."""
    max_tokens: PositiveInt = 512
    """Per vote. A vote that is cut off there does not count."""
    max_length: PositiveInt | None = None
    """Question plus vote, in tokens. Default: the model's own limit."""
    template: str | None = None
    """jinja2, with `question`, `reference` (the prompt's answer, or none) and `answer`, or `first`
    and `second` in pairwise mode. Each comes fenced between lines that carry `fence`, a code that
    none of them contains. Default: rayhf/scorer/judge_text.py."""
    verdict: str | None = None
    """Regular expression of the verdict; its last match in the judge's own words counts. One group
    that holds yes or no, a number from 1 to 10, or a, b or tie; or groups named `yes` and `no`,
    `rating`, or `first`, `second` and `tie`."""
    dtype: Dtype = "bfloat16"
    kv_cache_gib: PositiveFloat | None = None
    """KV cache of its engine in GiB. Default: as rollout.kv_cache_gib."""

    @model_validator(mode="after")
    def _check_votes(self) -> JudgeConfig:
        if self.votes > 1 and self.temperature == 0:
            raise ValueError(
                f"votes is {self.votes} at temperature 0, which would be the same vote each time; try temperature 0.7"
            )
        if 0 < self.temperature < 0.01:
            raise ValueError(f"temperature is {self.temperature:g}; expected 0 or at least 0.01")
        if self.mode == "pairwise" and (self.transform is not None or self.normalize):
            raise ValueError(
                "transform and normalize are for scores; a pairwise judge gives probabilities"
            )
        return self


class GrpcScorerConfig(PointwiseEntry):
    """Scorers that `rayhf serve-scorer` serves, on one machine or on many that serve the same."""

    type: Literal["remote"] = "remote"
    endpoints: tuple[str, ...] = Field(min_length=1)
    """host:port each."""
    pairwise: bool = False
    """What is served compares answers by itself; `rayhf check` asks whether that is so."""
    security: EndpointSecurity = NO_SECURITY
    timeout_s: PositiveFloat = 60.0
    """Per call, in seconds."""
    batch: PositiveInt = 64
    """Completions per call; all of one prompt's go together."""
    in_flight: PositiveInt = 4
    """Calls at a time to one endpoint."""
    max_message_mib: PositiveInt = 16
    """Of one call; the service's own limit, or less."""

    @model_validator(mode="after")
    def _check_endpoints(self) -> GrpcScorerConfig:
        for endpoint in self.endpoints:
            split_endpoint(endpoint, self.security)
        if self.pairwise and (self.transform is not None or self.normalize):
            raise ValueError(
                "transform and normalize are for scores; a pairwise service gives probabilities"
            )
        return self


ScorerEntry = Annotated[
    RuleConfig
    | RewardModelConfig
    | PairwiseRuleConfig
    | PreferenceModelConfig
    | JudgeConfig
    | GrpcScorerConfig,
    Field(discriminator="type"),
]


class CombineConfig(Section):
    """How the entries' scores become one.

    weighted_sum: sum_i w_i u_i. mean: sum_i w_i u_i / sum_i w_i. worst: min_i u_i. uncertainty: the
    mean minus coef times the weighted variance around it. The last two are Coste et al. 2023
    (2310.02743), worst-case and uncertainty-weighted optimization.
    """

    type: Literal["weighted_sum", "mean", "worst", "uncertainty"] = "weighted_sum"
    coef: NonNegativeFloat = 0.1
    """Of uncertainty. Coste et al.: 0.1 for PPO, 0.5 to 1 for best-of-n."""


WEIGHTED_SUM = CombineConfig()


class ScorerConfig(Section):
    train: tuple[ScorerEntry, ...] = Field(min_length=1)
    """Combined, they are the score."""
    combine: CombineConfig = WEIGHTED_SUM
    """Of train; evaluation takes weighted sums."""
    evaluate: tuple[ScorerEntry, ...] | None = None
    """For held-out evaluation only. Default: the training scorers."""
    max_failed: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of a round's completions that may be Failed or Invalid before the run stops."""
    attempts: PositiveInt = 4
    """Calls at most for a completion whose scorer could not be reached. A scorer that answers
    nothing at all pauses the campaign until it is back."""
    threads: PositiveInt | None = None


def is_pairwise(entry: ScorerEntry) -> bool:
    """It compares answers by itself. Such a scorer has no score for an answer that stands alone."""
    if isinstance(entry, GrpcScorerConfig):
        return entry.pairwise
    return isinstance(entry, PairwiseRuleConfig | PreferenceModelConfig) or (
        isinstance(entry, JudgeConfig) and entry.mode == "pairwise"
    )


def has_model(entry: ScorerEntry) -> bool:
    """It needs a GPU where there is one."""
    return isinstance(entry, RewardModelConfig | PreferenceModelConfig | JudgeConfig)

"""Base of the policy-gradient family: PPO, GRPO, RLOO, REINFORCE++.

One iteration: n scored samples per prompt; token rewards, which are the score at the last token
minus the KL penalty; advantages, in which the subclasses differ; a policy-gradient loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rayhf.algorithms.advantages import (
    AdaptiveKL,
    Array,
    kl_penalty,
    missing_eos_penalty,
    overlong_penalty,
    row_sums,
)
from rayhf.algorithms.base import (
    AlgorithmBase,
    Selection,
    SelectionContext,
    sample_and_score,
    scored,
)
from rayhf.algorithms.context import ExplorationContext
from rayhf.config.algorithms import (
    AlgorithmConfig,
    ImportanceConfig,
    InitialReference,
    ReferenceSchedule,
)
from rayhf.config.base import Section
from rayhf.config.registry import LOSSES
from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError
from rayhf.losses.base import Loss
from rayhf.losses.policy import ClippedSurrogateConfig, KLEstimator, KLTerm, PolicyLossConfig
from rayhf.types import (
    Completion,
    Example,
    FloatArray,
    Group,
    JsonObject,
    Prompt,
    Row,
    make_row,
)


class KLConfig(Section):
    """KL penalty to the initial policy."""

    coef: NonNegativeFloat = 0.01
    """Coefficient of the penalty (OpenRLHF's default); 0 is off."""
    estimator: KLEstimator = "k1"
    """Per-token estimator (Schulman 2020)."""
    where: Literal["reward", "loss"] = "reward"
    """Where it is added: to each token's reward, or to the loss."""
    target: PositiveFloat | None = None
    """Target KL per completion of the adaptive coefficient (Ziegler et al. 2019), in nats. Default:
    a fixed coefficient."""
    horizon: PositiveInt = 10000
    """Time constant of the adaptive coefficient, in completions."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.where == "loss" and self.estimator == "k1":
            raise ValueError(
                "estimator k1 has no useful gradient as a loss; expected k2 or k3, or where: reward"
            )
        if self.target is not None and self.coef == 0:
            raise ValueError("an adaptive coefficient must start above 0; coef is 0")
        return self


class PolicyGradientConfig(AlgorithmConfig):
    """Settings of the whole family."""

    trains_at_sampling_temperature: ClassVar[bool] = True
    samples: PositiveInt = 1
    """Completions per prompt."""
    loss: Annotated[PolicyLossConfig, LOSSES.defaulting("clipped")] = ClippedSurrogateConfig()
    """A policy-gradient loss."""
    kl: KLConfig = KLConfig()
    reward_clip: PositiveFloat | None = 10.0
    """Largest absolute score, after the group's baseline where there is one (grpo, rloo); larger
    ones are clipped (OpenRLHF) and counted as ppo/reward_clipped. null is off."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Penalty on the score of a truncated completion (finish_reason "length")."""
    overlong_buffer: NonNegativeInt = 0
    """Tokens before rollout.max_tokens over which the length penalty grows (DAPO); 0 is off."""
    overlong_penalty: NonNegativeFloat = 1.0
    """Length penalty at rollout.max_tokens."""
    drop_uniform_groups: bool = False
    """Drop prompts whose completions all have the same score: they have no advantage (DAPO's
    dynamic sampling)."""
    importance: ImportanceConfig = ImportanceConfig()

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse sampling whose log-probs are not known, and a length penalty from token 0 on.

        Raises ConfigError.
        """
        rollout = campaign.rollout
        if rollout.temperature != 1 and (rollout.top_p < 1 or rollout.top_k):
            raise ConfigError(
                f"rollout.top_p is {rollout.top_p:g} and rollout.top_k {rollout.top_k} with "
                f"rollout.temperature {rollout.temperature:g}: the engines' log-probs would not be "
                f"those of the policy that {self.type} trains; expected temperature 1, or top_p 1 "
                "and top_k 0"
            )
        if self.overlong_buffer > campaign.rollout.max_tokens:
            raise ConfigError(
                f"algorithm.overlong_buffer is {self.overlong_buffer}; expected at most "
                f"rollout.max_tokens {campaign.rollout.max_tokens}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationTokens:
    """All rows of an iteration: values per token are end to end, N in all."""

    prompt_ids: Sequence[str]
    """Prompt of each row; the rows of one prompt are a group."""
    lengths: npt.NDArray[np.int64]
    """Number of tokens of each row: (R,)."""
    scores: Array
    """(R,)."""
    kl: Array
    """KL penalty per token, in nats: (N,)."""
    value: FloatArray | None
    """The critic's value per token, where there is a critic: (N,)."""


class PolicyGradient(AlgorithmBase, ABC):
    """Base class; subclasses turn scores and KL penalties into advantages."""

    min_group: ClassVar[int] = 1
    """Smallest number of scored completions in a prompt's group."""
    has_group_baseline: ClassVar[bool] = False
    """Whether advantages are scores minus a baseline of the group: reward_clip then bounds the
    advantage, because clipping scores would make different ones equal."""

    def __init__(self, config: PolicyGradientConfig) -> None:
        self.config = config
        self.samples = config.samples
        kl = config.kl
        self.reference: ReferenceSchedule | None = InitialReference() if kl.coef > 0 else None
        self._adaptive_kl = (
            AdaptiveKL(kl.coef, kl.target, kl.horizon) if kl.target is not None else None
        )
        self._completions = 0
        """Of the iteration that was credited last."""

    @property
    def kl_coef(self) -> float:
        """Current coefficient of the KL penalty."""
        return self._adaptive_kl.coef if self._adaptive_kl else self.config.kl.coef

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Draw `samples` completions and score them."""
        return await sample_and_score(prompt, context, self.samples)

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Make one example per scored completion; groups that are too small are dropped."""
        examples: list[Example] = []
        small = 0
        uniform = 0
        clipped = 0
        max_tokens = context.sampling.max_tokens
        for group in groups:
            usable = []
            for i, sample, score in scored(group):
                bounded = self._clip_score(score)
                clipped += bounded != score
                usable.append((i, self._shape_score(sample.completion, bounded, max_tokens)))
            if len({score for _, score in usable}) == 1 and len(usable) > 1:
                uniform += 1
                if self.config.drop_uniform_groups:
                    continue
            if len(usable) < self.min_group:
                small += 1
                continue
            examples += [Example(rows=(make_row(group, i, score=score),)) for i, score in usable]
        uniform_share = uniform / max(len(groups), 1)
        metrics = {"ppo/groups_uniform": uniform_share, "ppo/groups_dropped": float(small)}
        if examples and not self.has_group_baseline:
            metrics["ppo/reward_clipped"] = clipped / len(examples)
        return Selection(
            examples=tuple(examples),
            metrics=metrics,
            no_signal=uniform_share,
        )

    def _clip_score(self, score: float) -> float:
        """Bound a score that no group baseline is subtracted from."""
        limit = self.config.reward_clip
        if limit is None or self.has_group_baseline:
            return score
        return min(max(score, -limit), limit)

    def _shape_score(self, completion: Completion, score: float, max_tokens: int) -> float:
        """Subtract the penalties on truncation and length from a score."""
        config = self.config
        score -= missing_eos_penalty(
            truncated=completion.finish_reason == "length", penalty=config.missing_eos_penalty
        )
        return score - overlong_penalty(
            len(completion.token_ids),
            max_tokens=max_tokens,
            buffer=config.overlong_buffer,
            penalty=config.overlong_penalty,
        )

    def credit(self, examples: Sequence[Example]) -> tuple[list[Example], dict[str, float]]:
        """Give every token its advantage."""
        self._completions = len(examples)
        metrics = {"ppo/kl_coef": self.kl_coef} if self.reference else {}
        if not examples:
            return [], metrics
        rows = [example.rows[0] for example in examples]
        in_reward = self.kl_coef if self.config.kl.where == "reward" else 0.0
        tokens = self._tokens(rows)
        credit = self.advantages(tokens, in_reward)
        limit = self.config.reward_clip
        if limit is not None and self.has_group_baseline:
            bounded = np.clip(credit["advantage"], -limit, limit)
            changed = row_sums(bounded != credit["advantage"], tokens.lengths) > 0
            metrics["ppo/reward_clipped"] = float(changed.mean())
            credit = {**credit, "advantage": bounded}
        credited = [
            replace(example, rows=(row,))
            for example, row in zip(examples, with_token_values(rows, credit), strict=True)
        ]
        return credited, metrics

    @abstractmethod
    def advantages(self, tokens: IterationTokens, kl_coef: float) -> dict[str, Array]:
        """Return `advantage`, and further values per token, by name: (N,).

        Args:
            tokens: the rows of the iteration.
            kl_coef: weight of the KL penalty in the reward; 0 where it is in the loss.
        """

    def _tokens(self, rows: Sequence[Row]) -> IterationTokens:
        """Return the rows' tokens, with the learner's own log-probs where it computed them."""
        logp = np.concatenate([r.tokens.get("old_logp", r.tokens["behavior_logp"]) for r in rows])
        frozen = logp
        if "ref_logp" in rows[0].tokens:
            frozen = np.concatenate([row.tokens["ref_logp"] for row in rows])
        value = None
        if "value" in rows[0].tokens:
            value = np.concatenate([row.tokens["value"] for row in rows])
        return IterationTokens(
            prompt_ids=[row.prompt_id for row in rows],
            lengths=np.array([len(row.response_ids) for row in rows]),
            scores=np.array([row.scalars["score"] for row in rows]),
            kl=kl_penalty(logp, frozen, self.config.kl.estimator),
            value=value,
        )

    def loss(self, objective: str = "policy") -> Loss:
        """Return the configured loss, with the KL term where it is in the loss."""
        kl = self.config.kl
        in_loss = self.reference is not None and kl.where == "loss"
        loss: Loss = LOSSES.build(
            self.config.loss,
            importance_cap=self.config.importance.cap,
            kl=KLTerm(coef=self.kl_coef, estimator=kl.estimator) if in_loss else None,
        )
        return loss

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Adapt the KL coefficient to the iteration's KL."""
        if self._adaptive_kl and "reference/kl" in metrics:
            self._adaptive_kl.update(metrics["reference/kl"], self._completions)

    def state_dict(self) -> JsonObject:
        """Return the adaptive coefficient."""
        return self._adaptive_kl.state_dict() if self._adaptive_kl else {}

    def load_state_dict(self, state: JsonObject) -> None:
        """Restore the adaptive coefficient."""
        if self._adaptive_kl:
            self._adaptive_kl.load_state_dict(state)


def with_token_values(rows: Sequence[Row], values: Mapping[str, Array]) -> list[Row]:
    """Return the rows with further token values, given for all rows end to end: (N,)."""
    short = {name: array.astype(np.float32) for name, array in values.items()}
    out = []
    start = 0
    for row in rows:
        end = start + len(row.response_ids)
        out.append(row.with_tokens(**{name: array[start:end] for name, array in short.items()}))
        start = end
    return out


def group_advantages(
    tokens: IterationTokens, kl_coef: float, estimate: Callable[[Array], Array]
) -> Array:
    """Return the advantage that `estimate` computes within each prompt's group: (N,).

    The score of a row is its own score minus the summed penalty. `estimate` takes the scores of
    groups of one size, (G, K), and returns as many advantages.
    """
    scores = tokens.scores - kl_coef * row_sums(tokens.kl, tokens.lengths)
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, prompt_id in enumerate(tokens.prompt_ids):
        groups[prompt_id].append(index)
    by_size: defaultdict[int, list[list[int]]] = defaultdict(list)
    for members in groups.values():
        by_size[len(members)].append(members)
    out = np.empty_like(scores)
    for same_size in by_size.values():
        index_GK = np.array(same_size)
        out[index_GK] = estimate(scores[index_GK])
    return np.repeat(out, tokens.lengths)

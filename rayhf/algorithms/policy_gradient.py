"""Base of the policy-gradient family: PPO, GRPO, RLOO, REINFORCE++.

One iteration: n scored samples per prompt; token rewards, which are the score at the last token
minus the KL penalty; advantages, in which the subclasses differ; a policy-gradient loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rayhf.algorithms.advantages import (
    AdaptiveKL,
    Array,
    kl_penalty,
    missing_eos_penalty,
    overlong_penalty,
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
from rayhf.types import Completion, Example, Group, JsonObject, Prompt, Row, make_row


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
        self._completions = len(examples)
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
        rows = [example.rows[0] for example in examples]
        kl = [self._kl(row) for row in rows]
        in_reward = self.kl_coef if self.config.kl.where == "reward" else 0.0
        metrics = {"ppo/kl_coef": self.kl_coef} if self.reference else {}
        advantages = self.advantages(rows, kl, in_reward)
        limit = self.config.reward_clip
        if rows and limit is not None and self.has_group_baseline:
            advantages, metrics["ppo/reward_clipped"] = clip_advantages(advantages, limit)
        credited = [
            replace(example, rows=(row,)) for example, row in zip(examples, advantages, strict=True)
        ]
        return credited, metrics

    @abstractmethod
    def advantages(self, rows: list[Row], kl: list[Array], kl_coef: float) -> list[Row]:
        """Return the rows with `advantage`.

        Args:
            rows: with the scalar `score`.
            kl: penalty per token of each row, in nats.
            kl_coef: its weight in the reward; 0 where the penalty is in the loss.
        """

    def _kl(self, row: Row) -> Array:
        """Return the KL per token, with the learner's own log-probs where it computed them."""
        logp = row.tokens.get("old_logp", row.tokens["behavior_logp"])
        return kl_penalty(logp, row.tokens.get("ref_logp", logp), self.config.kl.estimator)

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


def clip_advantages(rows: Sequence[Row], limit: float) -> tuple[list[Row], float]:
    """Return the rows with advantages bounded to +-limit, and the share of rows that changed."""
    clipped = []
    changed = 0
    for row in rows:
        advantage = row.tokens["advantage"]
        bounded = np.clip(advantage, -limit, limit)
        changed += bool((bounded != advantage).any())
        clipped.append(row.with_tokens(advantage=bounded))
    return clipped, changed / len(rows)


def group_advantages(
    rows: list[Row], kl: list[Array], kl_coef: float, estimate: Callable[[list[float]], Array]
) -> list[Row]:
    """Return the rows with the advantage that `estimate` computes within each prompt's group.

    The score of a row is its `score` minus the summed penalty.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row.prompt_id].append(index)
    out = list(rows)
    for members in groups.values():
        scores = [rows[i].scalars["score"] - kl_coef * kl[i].sum() for i in members]
        for i, advantage in zip(members, estimate(scores), strict=True):
            out[i] = rows[i].with_tokens(
                advantage=np.full(len(rows[i].response_ids), advantage, dtype=np.float32)
            )
    return out

"""On-policy distillation: the policy samples, a teacher says how likely each token was.

Agarwal et al. 2023 (GKD, with samples of the student only and the reverse KL), Gu et al. 2023
(MiniLLM), Thinking Machines 2025 ("On-Policy Distillation", whose recipe has the defaults). The
teacher is the model in the reference role, reference.model. With `top_k` it also says which tokens
were likeliest, and each position's KL is a term of the loss (rayhf/losses/distill.py). Metrics to
watch: reference/kl, which is KL(policy || teacher) here, and eval/<task>/sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rayhf.algorithms.advantages import Array, centered, discounted_sums, grpo
from rayhf.algorithms.base import Selection, SelectionContext
from rayhf.algorithms.context import ExplorationContext
from rayhf.algorithms.policy_gradient import IterationTokens, PolicyGradient, group_advantages
from rayhf.algorithms.policy_gradient_config import KLConfig, PolicyGradientConfig
from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError
from rayhf.losses.base import Loss
from rayhf.losses.distill import DistillLoss
from rayhf.losses.policy import PolicyLoss
from rayhf.types import Example, Group, Prompt, Sample, make_row


class DistillKLConfig(KLConfig):
    """Reverse KL to the teacher, as each token's reward: teacher's log-prob minus the policy's.

    With top_k, as a term of the loss.
    """

    coef: PositiveFloat = 1.0
    """Weight of the teacher (Thinking Machines)."""
    estimator: Literal["k1"] = "k1"
    """Per-token estimator; only k1 has the gradient of the KL as a reward. top_k needs none."""
    where: Literal["reward"] = "reward"
    """It is the reward; with top_k it is in the loss in any case."""
    unbiased: Literal[False] = False
    """For terms of a loss only."""
    target: None = None
    """An adaptive coefficient holds the policy at a distance; there is none to the teacher."""


class DistillConfig(PolicyGradientConfig):
    """On-policy distillation (Agarwal et al. 2023; Thinking Machines 2025)."""

    type: str = "distill"
    samples: PositiveInt = 4
    """Completions per prompt (Thinking Machines)."""
    kl: DistillKLConfig = DistillKLConfig()
    top_k: NonNegativeInt = 0
    """Compare the policy with the teacher on the teacher's top_k likeliest tokens of each position,
    and on the rest of the vocabulary as one more (Huebotter et al. 2026 use 100 of the student's).
    0: on the sampled token only (Thinking Machines)."""
    discount: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the next token's return that a token is credited with. 0: every token answers for
    its own KL only (Thinking Machines); 1: also for that of all later tokens (MiniLLM)."""
    reward_coef: NonNegativeFloat = 0.0
    """Weight of the scorers' reward beside the teacher: a completion's advantage in its group. 0:
    nothing is scored, and scorer.train is for evaluations only."""
    scale: Literal["group", "none"] = "group"
    """What a score's distance from the group's mean is divided by: the group's standard deviation
    (GRPO), or nothing (Dr. GRPO)."""
    reward_clip: PositiveFloat | None = None
    """Largest absolute advantage of a token; larger ones are clipped and counted as
    ppo/reward_clipped. null is off (Thinking Machines)."""

    @model_validator(mode="after")
    def _check_reward(self) -> Self:
        if self.drops_uniform:
            raise ValueError(
                "drop_uniform_groups and refill leave out prompts whose completions score alike, "
                "but the teacher judges these too; expected neither"
            )
        if self.reward_coef == 0 and (self.missing_eos_penalty or self.overlong_buffer != 0):
            raise ValueError(
                "missing_eos_penalty and overlong_buffer change scores, and with reward_coef 0 "
                "there are none; expected 0 for both, or reward_coef above 0"
            )
        if self.top_k and self.discount:
            raise ValueError(
                "discount credits a sampled token with what follows, and with top_k the KL of a "
                "position does not depend on the sampled token; expected discount 0, or top_k 0"
            )
        if self.top_k and self.reward_coef == 0 and self.reward_clip is not None:
            raise ValueError(
                "reward_clip bounds the advantages of tokens, and with top_k and reward_coef 0 "
                "there are none; expected null, or reward_coef above 0"
            )
        if self.reward_coef and self.samples < 2:
            raise ValueError(
                "the baseline of a score is the mean of its prompt's completions; with reward_coef "
                "above 0 expected samples of at least 2"
            )
        return self

    def check_campaign(self, campaign: CampaignConfig) -> None:
        """Refuse a campaign without a teacher. Raises ConfigError."""
        super().check_campaign(campaign)
        if campaign.reference.model is None:
            raise ConfigError(
                "reference.model: distill learns from a teacher, and there is none; expected a "
                "model directory or hub name with the policy's tokenizer"
            )


class Distill(PolicyGradient):
    """On-policy distillation: reverse KL to a teacher on the policy's samples (GKD, MiniLLM)."""

    Config = DistillConfig
    config: DistillConfig
    has_group_baseline = True
    # The student starts far from its teacher, and takes the teacher's entropy.
    muted_guards = frozenset({"kl", "entropy"})

    def __init__(self, config: DistillConfig) -> None:
        super().__init__(config)
        self.needs_scorer = config.reward_coef > 0
        self.reference_top_k = config.top_k

    async def explore(self, prompt: Prompt, context: ExplorationContext) -> Group:
        """Draw `samples` completions; score them where the reward counts."""
        if self.needs_scorer:
            return await super().explore(prompt, context)
        completions = await context.sample(self.samples)
        return Group(
            prompt=prompt,
            samples=tuple(Sample(completion=each, outcome=None) for each in completions),
        )

    def select(self, groups: Sequence[Group], context: SelectionContext) -> Selection:
        """Make one example per completion; where the reward counts, per scored one."""
        if self.needs_scorer:
            # Completions that score alike still have the teacher's signal.
            return replace(super().select(groups, context), no_signal=None)
        self._max_tokens = context.sampling.max_tokens
        return Selection(
            examples=tuple(
                Example(rows=(make_row(group, index, score=math.nan),))
                for group in groups
                for index in range(len(group.samples))
            )
        )

    def advantages(self, tokens: IterationTokens, kl_coef: float) -> dict[str, Array]:
        """Return `advantage`."""
        if self.config.top_k:  # the teacher is in the loss
            advantage = np.zeros_like(tokens.kl)
        else:  # `kl` is the policy's log-prob minus the teacher's
            advantage = discounted_sums(-kl_coef * tokens.kl, tokens.lengths, self.config.discount)
        if self.needs_scorer:
            estimate = grpo if self.config.scale == "group" else centered
            reward = group_advantages(tokens, 0.0, estimate)
            advantage = advantage + self.config.reward_coef * reward
        return {"advantage": advantage}

    def loss(self, objective: str = "policy") -> Loss:
        """Return the policy-gradient loss; with top_k, the KL to the teacher is added."""
        loss = super().loss(objective)
        if not self.config.top_k:
            return loss
        assert isinstance(loss, PolicyLoss)
        return DistillLoss(loss, self.kl_coef)

"""Settings of the policy-gradient family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from rayhf.config.algorithms import AlgorithmConfig, PolicyImportanceConfig, RefillConfig
from rayhf.config.base import Section
from rayhf.config.registry import LOSSES
from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError
from rayhf.losses.kl import KLEstimator
from rayhf.losses.policy import ClippedSurrogateConfig, PolicyLossConfig

PolicyLossSetting = Annotated[PolicyLossConfig, LOSSES.defaulting("clipped")]
"""Type of the field `loss`."""


class KLConfig(Section):
    """KL penalty to the initial policy."""

    coef: NonNegativeFloat = 0.01
    """Coefficient of the penalty (OpenRLHF's default); 0 is off."""
    estimator: KLEstimator = "k1"
    """Per-token estimator (Schulman 2020)."""
    where: Literal["reward", "loss"] = "reward"
    """Where it is added: to each token's reward, or to the loss."""
    unbiased: bool = False
    """Weight the term of the loss by the ratio of the policy to the one that sampled, so that its
    gradient is that of the reverse KL also with k3 and in later optimizer steps (DeepSeek-AI 2025,
    DeepSeek-V3.2, eq. 7)."""
    target: PositiveFloat | None = None
    """Target KL per completion of the adaptive coefficient (Ziegler et al. 2019), in nats. Default:
    a fixed coefficient."""
    horizon: PositiveInt = 10000
    """Time constant of the adaptive coefficient, in completions."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.where == "loss" and self.estimator == "k1" and not self.unbiased:
            raise ValueError(
                "estimator k1 has no useful gradient as a loss; expected k2 or k3, or where: reward"
            )
        if self.unbiased and self.where == "reward":
            raise ValueError(
                "unbiased is for where: loss; in the reward, k1 is unbiased as it is; expected "
                "unbiased: false"
            )
        if self.target is not None and self.coef == 0:
            raise ValueError("an adaptive coefficient must start above 0; coef is 0")
        return self


class EntropyConfig(Section):
    """Entropy bonus that keeps the entropy from falling below a target (Skywork-OR1)."""

    target: PositiveFloat
    """Entropy in nats per token. The bonus is applied after iterations at or below it."""
    step: PositiveFloat = 1e-4
    """Change of the coefficient per iteration: up below the target, down above it (ours)."""
    largest: PositiveFloat = 5e-3
    """Largest coefficient (ours)."""


class PolicyGradientConfig(AlgorithmConfig):
    """Settings of the whole family."""

    trains_at_sampling_temperature: ClassVar[bool] = True
    samples: PositiveInt = 1
    """Completions per prompt."""
    loss: PolicyLossSetting = ClippedSurrogateConfig()
    """A policy-gradient loss: clipped, gspo or cispo. Keys that are left out have the algorithm's
    defaults."""
    kl: KLConfig = KLConfig()
    entropy: EntropyConfig | None = None
    """Adaptive entropy bonus, in place of loss.entropy_coef."""
    reward_clip: PositiveFloat | None = 10.0
    """Largest absolute score, after the group's baseline where there is one; larger ones are
    clipped (OpenRLHF) and counted as ppo/reward_clipped. null is off."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Penalty on the score of a truncated completion (finish_reason "length")."""
    overlong_buffer: NonNegativeInt | None = 0
    """Tokens before rollout.max_tokens over which the length penalty grows (DAPO); 0 is off, null
    is a fifth of rollout.max_tokens (DAPO: 4,096 of 20,480)."""
    overlong_penalty: NonNegativeFloat = 1.0
    """Length penalty at rollout.max_tokens."""
    drop_truncated: bool = False
    """Do not train on truncated completions; their scores still count in their group's baseline
    (DAPO's overlong filtering)."""
    drop_uniform_groups: bool = False
    """Drop prompts whose completions all have the same score: they have no advantage (DAPO's
    dynamic sampling)."""
    refill: RefillConfig = RefillConfig()
    importance: PolicyImportanceConfig = PolicyImportanceConfig()

    @field_validator("loss", mode="before")
    @classmethod
    def _fill_loss(cls, value: object) -> object:
        """Take keys that a config leaves out from this algorithm's own default."""
        default = cls.model_fields["loss"].default
        if isinstance(value, Mapping) and value.get("type", default.type) == default.type:
            return {**default.model_dump(), **value}
        return value

    @model_validator(mode="after")
    def _check_entropy(self) -> Self:
        if self.entropy is not None and self.loss.entropy_coef:
            raise ValueError(
                f"loss.entropy_coef is {self.loss.entropy_coef:g} and entropy sets the coefficient "
                "too; expected one of them"
            )
        return self

    @property
    def drops_uniform(self) -> bool:
        """Whether prompts without different scores are left out."""
        return self.drop_uniform_groups or self.refill.budget > 1

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
        if (self.overlong_buffer or 0) > campaign.rollout.max_tokens:
            raise ConfigError(
                f"algorithm.overlong_buffer is {self.overlong_buffer}; expected at most "
                f"rollout.max_tokens {campaign.rollout.max_tokens}"
            )

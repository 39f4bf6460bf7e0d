"""GRPO: the advantage is a score's distance from its group's mean, in standard deviations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat

from rayhf.algorithms.advantages import Array, grpo
from rayhf.algorithms.policy_gradient import (
    IterationTokens,
    KLConfig,
    PolicyGradient,
    PolicyGradientConfig,
    group_advantages,
)
from rayhf.losses.policy import KLEstimator


class GRPOKLConfig(KLConfig):
    """KL penalty to the initial policy (DeepSeekMath, section 4.2)."""

    coef: NonNegativeFloat = 0.04
    """DeepSeekMath's coefficient."""
    estimator: KLEstimator = "k3"
    """DeepSeekMath's estimator."""
    where: Literal["reward", "loss"] = "loss"
    """In DeepSeekMath it is a term of the loss."""


class GRPOConfig(PolicyGradientConfig):
    """GRPO (Shao et al. 2024, DeepSeekMath, section 4.1)."""

    type: str = "grpo"
    samples: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt, the group that normalizes scores (ours; DeepSeekMath has 64)."""
    kl: GRPOKLConfig = GRPOKLConfig()


class GRPO(PolicyGradient):
    """GRPO: group-normalized advantages, no critic (Shao et al. 2024)."""

    Config = GRPOConfig
    min_group = 2
    has_group_baseline = True

    def advantages(self, tokens: IterationTokens, kl_coef: float) -> dict[str, Array]:
        """Return `advantage`."""
        return {"advantage": group_advantages(tokens, kl_coef, grpo)}

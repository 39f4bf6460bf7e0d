"""GRPO: the advantage is a score's distance from its group's mean, in standard deviations.

The base of its variants: dapo.py, dr_grpo.py, gspo.py, cispo.py.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat

from rayhf.algorithms.advantages import Array, centered, grpo
from rayhf.algorithms.policy_gradient import IterationTokens, PolicyGradient, group_advantages
from rayhf.algorithms.policy_gradient_config import (
    KLConfig,
    PolicyGradientConfig,
    PolicyLossSetting,
)
from rayhf.losses.kl import KLEstimator
from rayhf.losses.policy import ClippedSurrogateConfig


class GRPOKLConfig(KLConfig):
    """KL penalty to the initial policy (DeepSeekMath, section 4.2)."""

    coef: NonNegativeFloat = 0.04
    """DeepSeekMath's coefficient."""
    estimator: KLEstimator = "k3"
    """DeepSeekMath's estimator."""
    where: Literal["reward", "loss"] = "loss"
    """In DeepSeekMath it is a term of the loss."""


class NoKLConfig(GRPOKLConfig):
    """KL penalty to the initial policy; the source has none."""

    coef: NonNegativeFloat = 0.0
    """Coefficient of the penalty; 0 is off."""


class GRPOConfig(PolicyGradientConfig):
    """GRPO (Shao et al. 2024, DeepSeekMath, section 4.1)."""

    type: str = "grpo"
    samples: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt, the group that normalizes scores (ours; DeepSeekMath has 64)."""
    scale: Literal["group", "none"] = "group"
    """What a score's distance from the group's mean is divided by: the group's standard deviation
    (GRPO), or nothing (Dr. GRPO)."""
    loss: PolicyLossSetting = ClippedSurrogateConfig(aggregate="sequence_mean")
    """A policy-gradient loss. Keys that are left out have the algorithm's defaults; DeepSeekMath's
    objective is a mean of completions."""
    kl: GRPOKLConfig = GRPOKLConfig()


class GRPO(PolicyGradient):
    """GRPO: group-normalized advantages, no critic (Shao et al. 2024)."""

    Config: ClassVar[type[GRPOConfig]] = GRPOConfig
    config: GRPOConfig
    min_group = 2
    has_group_baseline = True

    def advantages(self, tokens: IterationTokens, kl_coef: float) -> dict[str, Array]:
        """Return `advantage`."""
        estimate = grpo if self.config.scale == "group" else centered
        return {"advantage": group_advantages(tokens, kl_coef, estimate)}

"""Dr. GRPO: GRPO without the two normalizations that bias its gradient."""

from __future__ import annotations

from typing import Literal

from rayhf.algorithms.grpo import GRPO, GRPOConfig, NoKLConfig
from rayhf.algorithms.policy_gradient_config import PolicyLossSetting
from rayhf.losses.policy import ClippedSurrogateConfig


class DrGRPOConfig(GRPOConfig):
    """Dr. GRPO (Liu et al. 2025, "Understanding R1-Zero-Like Training", section 3)."""

    type: str = "dr_grpo"
    scale: Literal["group", "none"] = "none"
    """What a score's distance from the group's mean is divided by: nothing (Dr. GRPO), or the
    group's standard deviation (GRPO)."""
    loss: PolicyLossSetting = ClippedSurrogateConfig(aggregate="constant_length")
    """A policy-gradient loss. Keys that are left out have the algorithm's defaults; sums over a
    completion's tokens are divided by a constant."""
    kl: NoKLConfig = NoKLConfig()


class DrGRPO(GRPO):
    """GRPO without division by the group's deviation or by lengths (Liu et al. 2025)."""

    Config = DrGRPOConfig

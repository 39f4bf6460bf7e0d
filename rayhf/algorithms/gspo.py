"""GSPO: GRPO whose importance ratio and clipping are those of whole completions."""

from __future__ import annotations

from rayhf.algorithms.grpo import GRPO, GRPOConfig, NoKLConfig
from rayhf.algorithms.policy_gradient_config import PolicyLossSetting
from rayhf.losses.gspo import GSPOLossConfig


class GSPOConfig(GRPOConfig):
    """GSPO (Zheng et al. 2025). It differs from grpo where an iteration has several steps."""

    type: str = "gspo"
    loss: PolicyLossSetting = GSPOLossConfig()
    """A policy-gradient loss. Keys that are left out have the algorithm's defaults."""
    kl: NoKLConfig = NoKLConfig()


class GSPO(GRPO):
    """GSPO: sequence-level ratio and clipping (Zheng et al. 2025)."""

    Config = GSPOConfig

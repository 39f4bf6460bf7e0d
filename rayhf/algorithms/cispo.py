"""CISPO: GRPO's advantages with a clipped importance weight in place of a clipped surrogate."""

from __future__ import annotations

from pydantic import NonNegativeInt

from rayhf.algorithms.grpo import GRPO, GRPOConfig, NoKLConfig
from rayhf.algorithms.policy_gradient_config import PolicyLossSetting
from rayhf.config.algorithms import RefillConfig
from rayhf.losses.cispo import CISPOLossConfig


class CISPOConfig(GRPOConfig):
    """CISPO (MiniMax 2025, MiniMax-M1, section 3.1), with DAPO's dynamic sampling and penalty."""

    type: str = "cispo"
    loss: PolicyLossSetting = CISPOLossConfig()
    """A policy-gradient loss. Keys that are left out have the algorithm's defaults."""
    kl: NoKLConfig = NoKLConfig()
    overlong_buffer: NonNegativeInt | None = None
    """Tokens before rollout.max_tokens over which the length penalty grows; 0 is off, null is a
    fifth of rollout.max_tokens (DAPO)."""
    drop_uniform_groups: bool = True
    """Drop prompts whose completions all have the same score (DAPO's dynamic sampling)."""
    refill: RefillConfig = RefillConfig(budget=3.0)
    """Further prompts in place of the dropped ones; the budget is ours."""


class CISPO(GRPO):
    """CISPO: clipped importance weights without gradient, so no token is dropped (MiniMax 2025)."""

    Config = CISPOConfig

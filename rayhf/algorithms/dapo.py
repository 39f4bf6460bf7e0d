"""DAPO: GRPO with a wider upper bound, token mean, dynamic sampling and a length penalty."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt

from rayhf.algorithms.grpo import GRPO, GRPOConfig, NoKLConfig
from rayhf.algorithms.policy_gradient_config import PolicyLossSetting
from rayhf.config.algorithms import RefillConfig
from rayhf.losses.policy import ClippedSurrogateConfig


class DAPOConfig(GRPOConfig):
    """DAPO (Yu et al. 2025)."""

    type: str = "dapo"
    samples: Annotated[int, Field(ge=2)] = 16
    """Completions per prompt (DAPO, section 4.1)."""
    loss: PolicyLossSetting = ClippedSurrogateConfig(clip_high=0.28)
    """A policy-gradient loss. Keys that are left out have the algorithm's defaults: bounds 0.2 and
    0.28, and a mean of tokens (DAPO, sections 3.1 and 3.3)."""
    kl: NoKLConfig = NoKLConfig()
    overlong_buffer: NonNegativeInt | None = None
    """Tokens before rollout.max_tokens over which the length penalty grows; 0 is off, null is a
    fifth of rollout.max_tokens (DAPO, section 3.4: 4,096 of 20,480)."""
    drop_uniform_groups: bool = True
    """Drop prompts whose completions all have the same score (DAPO, section 3.2)."""
    refill: RefillConfig = RefillConfig(budget=3.0)
    """Further prompts in place of the dropped ones. DAPO samples until the batch is full; the
    budget is ours."""


class DAPO(GRPO):
    """DAPO: clip-higher, token mean, dynamic sampling, length penalty (Yu et al. 2025)."""

    Config = DAPOConfig

"""RLOO: the advantage is a score minus the mean of the other scores in its group."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat

from rayhf.algorithms.advantages import Array, rloo
from rayhf.algorithms.policy_gradient import IterationTokens, PolicyGradient, group_advantages
from rayhf.algorithms.policy_gradient_config import KLConfig, PolicyGradientConfig


class RLOOKLConfig(KLConfig):
    """KL penalty to the initial policy; a completion's whole penalty is part of its score."""

    coef: NonNegativeFloat = 0.05
    """TRL's coefficient."""


class RLOOConfig(PolicyGradientConfig):
    """RLOO (Ahmadian et al. 2024)."""

    type: str = "rloo"
    samples: Annotated[int, Field(ge=2)] = 2
    """Completions per prompt, each the others' baseline (the paper has 2 and 4)."""
    kl: RLOOKLConfig = RLOOKLConfig()


class RLOO(PolicyGradient):
    """RLOO: leave-one-out baseline, no critic (Ahmadian et al. 2024)."""

    Config = RLOOConfig
    min_group = 2
    has_group_baseline = True

    def advantages(self, tokens: IterationTokens, kl_coef: float) -> dict[str, Array]:
        """Return `advantage`."""
        return {"advantage": group_advantages(tokens, kl_coef, rloo)}

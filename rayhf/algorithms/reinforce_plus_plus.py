"""REINFORCE++: the reward-to-go of every token, normalized over the whole iteration."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rayhf.algorithms.advantages import Array, reinforce_plus_plus, whiten
from rayhf.algorithms.policy_gradient import IterationTokens, PolicyGradient
from rayhf.algorithms.policy_gradient_config import PolicyGradientConfig


class ReinforcePlusPlusConfig(PolicyGradientConfig):
    """REINFORCE++ (Hu et al. 2025), the variant without a group baseline."""

    type: str = "reinforce++"
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token."""
    whiten_rewards: bool = False
    """Divide token rewards by their standard deviation, keeping the mean."""


class ReinforcePlusPlus(PolicyGradient):
    """REINFORCE++: batch-normalized reward-to-go, no critic (Hu et al. 2025)."""

    Config = ReinforcePlusPlusConfig
    config: ReinforcePlusPlusConfig

    def advantages(self, tokens: IterationTokens, kl_coef: float) -> dict[str, Array]:
        """Return `advantage`."""
        rewards = tokens.rewards(kl_coef)
        if self.config.whiten_rewards:
            rewards = whiten(rewards, keep_mean=True)
        return {"advantage": reinforce_plus_plus(rewards, tokens.lengths, self.config.gamma)}

"""REINFORCE++: the reward-to-go of every token, normalized over the whole iteration."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from rayhf.algorithms.advantages import Array, reinforce_plus_plus, token_rewards, whiten
from rayhf.algorithms.policy_gradient import PolicyGradient, PolicyGradientConfig
from rayhf.types import Row


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

    def advantages(self, rows: list[Row], kl: list[Array], kl_coef: float) -> list[Row]:
        """Return the rows with `advantage`."""
        rewards = [
            token_rewards(penalty, kl_coef, row.scalars["score"])
            for penalty, row in zip(kl, rows, strict=True)
        ]
        if self.config.whiten_rewards:
            rewards = whiten(rewards, keep_mean=True)
        estimates = reinforce_plus_plus(rewards, self.config.gamma)
        return [
            row.with_tokens(advantage=a.astype(np.float32))
            for row, a in zip(rows, estimates, strict=True)
        ]

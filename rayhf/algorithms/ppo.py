"""PPO for RLHF: a critic, generalized advantage estimation, the clipped surrogate."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, PositiveFloat

from rayhf.algorithms.advantages import Array, gae, whiten
from rayhf.algorithms.policy_gradient import IterationTokens, PolicyGradient
from rayhf.algorithms.policy_gradient_config import PolicyGradientConfig
from rayhf.losses.base import Loss
from rayhf.losses.value import ValueLoss


class PPOConfig(PolicyGradientConfig):
    """PPO with a critic and token rewards (Ouyang et al. 2022; Huang et al. 2024)."""

    type: str = "ppo"
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """GAE lambda (Huang et al. 2024, "N+ implementation details")."""
    value_clip: PositiveFloat | None = 0.2
    """How far values may move from those that the advantages were computed with; null is off."""
    whiten_advantages: bool = True
    """Normalize advantages over the iteration to mean 0 and standard deviation 1."""
    whiten_rewards: bool = False
    """Divide token rewards by their standard deviation, keeping the mean."""
    critic_warmup: NonNegativeInt = 0
    """Iterations at the start in which only the critic is trained."""

    def for_calibration(self) -> Self:
        """Return the setting without warm-up."""
        return self.model_copy(update={"critic_warmup": 0})


class PPO(PolicyGradient):
    """PPO with a critic: GAE advantages and the clipped surrogate (Schulman et al. 2017)."""

    Config = PPOConfig
    config: PPOConfig

    def advantages(self, tokens: IterationTokens, kl_coef: float) -> dict[str, Array]:
        """Return `advantage` and `return`."""
        config = self.config
        assert tokens.value is not None  # PPO has a critic
        lengths = tokens.lengths
        rewards = tokens.rewards(kl_coef)
        if config.whiten_rewards:
            rewards = whiten(rewards, keep_mean=True)
        advantage, returns = gae(rewards, tokens.value, lengths, config.gamma, config.lam)
        if config.whiten_advantages:
            advantage = whiten(advantage)
        return {"advantage": advantage, "return": returns}

    def critic_loss(self) -> Loss:
        """Return the clipped squared error to the returns."""
        return ValueLoss(value_clip=self.config.value_clip)

    def trains_policy(self, iteration: int) -> bool:
        """Whether the critic's warm-up is over."""
        return iteration > self.config.critic_warmup

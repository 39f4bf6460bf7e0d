"""REINFORCE++ with the group's mean as baseline, normalized over the whole iteration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayhf.algorithms.advantages import Array, centered, whiten
from rayhf.algorithms.policy_gradient import IterationTokens, PolicyGradient, group_advantages
from rayhf.algorithms.policy_gradient_config import KLConfig, PolicyGradientConfig
from rayhf.losses.kl import KLEstimator


class BaselineKLConfig(KLConfig):
    """KL penalty to the initial policy."""

    estimator: KLEstimator = "k2"
    """REINFORCE++'s estimator for the variant with a baseline."""
    where: Literal["reward", "loss"] = "loss"
    """In the variant with a baseline it is a term of the loss."""


class ReinforcePlusPlusBaselineConfig(PolicyGradientConfig):
    """REINFORCE++ with baseline (Hu et al. 2025), for several completions per prompt."""

    type: str = "reinforce++_baseline"
    samples: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt; their mean score is the baseline (ours)."""
    kl: BaselineKLConfig = BaselineKLConfig()


class ReinforcePlusPlusBaseline(PolicyGradient):
    """REINFORCE++ with baseline: score minus group mean, batch-normalized (Hu et al. 2025)."""

    Config = ReinforcePlusPlusBaselineConfig
    min_group = 2
    has_group_baseline = True

    def advantages(self, tokens: IterationTokens, kl_coef: float) -> dict[str, Array]:
        """Return `advantage`, normalized over all tokens of the iteration together."""
        return {"advantage": whiten(group_advantages(tokens, kl_coef, centered))}

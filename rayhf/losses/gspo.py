"""GSPO's loss: one importance ratio per response, and its clipping."""

from __future__ import annotations

from pydantic import PositiveFloat
from torch import Tensor

from rayhf.losses.base import MicroBatch, sum_rows
from rayhf.losses.policy import (
    PolicyAggregate,
    PolicyLoss,
    PolicyLossConfig,
    SurrogateTerms,
    clipped_surrogate,
)
from rayhf.losses.ratios import safe_exp


class GSPOLossConfig(PolicyLossConfig):
    """Bounds of the sequence ratio (Zheng et al. 2025, section 5.1)."""

    type: str = "gspo"
    aggregate: PolicyAggregate = "sequence_mean"
    """Mean over the whole optimizer step; the paper's objective is a mean of responses."""
    clip_low: PositiveFloat = 3e-4
    """Lower bound of the ratio is 1 - clip_low."""
    clip_high: PositiveFloat = 4e-4
    """Upper bound of the ratio is 1 + clip_high."""


class GSPOLoss(PolicyLoss):
    """GSPO: a response's geometric mean ratio is clipped, with all its tokens (Zheng et al. 2025).

    s = exp(mean over the response of logp - old_logp), and the loss is
    -min(s * A, clip(s, 1 - clip_low, 1 + clip_high) * A).
    """

    Config = GSPOLossConfig
    config: GSPOLossConfig

    def surrogate(
        self, logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, micro: MicroBatch
    ) -> SurrogateTerms:
        """Return the clipped loss per token in the form of GSPO-token (section 4.3).

        Every token has the value of s and the gradient of its own log-prob. With one advantage per
        response, value and gradient of the response's mean are those of GSPO itself.
        """
        gap_T = logp_T - old_logp_T
        mean_R = sum_rows(gap_T.detach(), micro) / micro.length_R.clamp(min=1.0)
        # Zero, with the gradient of logp.
        gradient_T = logp_T - logp_T.detach()
        ratio_T = safe_exp(mean_R[micro.row_T] + gradient_T)
        config = self.config
        return clipped_surrogate(ratio_T, advantage_T, config.clip_low, config.clip_high, None)

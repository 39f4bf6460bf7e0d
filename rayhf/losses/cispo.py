"""CISPO's loss: REINFORCE whose importance weight is clipped and carries no gradient."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from rayhf.losses.base import MicroBatch
from rayhf.losses.policy import PolicyLoss, PolicyLossConfig, SurrogateTerms
from rayhf.losses.ratios import safe_exp


class CISPOLossConfig(PolicyLossConfig):
    """Bounds of the importance weight (MiniMax 2025, MiniMax-M1, eq. 4 and 5)."""

    type: str = "cispo"
    clip_low: Annotated[float, Field(gt=0, le=1)] | None = None
    """Lower bound of the weight is 1 - clip_low; null is none (MiniMax-M1)."""
    clip_high: PositiveFloat = 4.0
    """Upper bound of the weight is 1 + clip_high (ours: MiniMax-M1 tuned it and does not give its
    value)."""


class CISPOLoss(PolicyLoss):
    """CISPO: -sg(clip(rho)) * A * logp, so that every token keeps a gradient (MiniMax 2025)."""

    Config = CISPOLossConfig
    config: CISPOLossConfig

    def surrogate(
        self, logp_T: Tensor, old_logp_T: Tensor, advantage_T: Tensor, micro: MicroBatch
    ) -> SurrogateTerms:
        """Return the loss per token; clip_low and clip_high are where the weight is bounded."""
        config = self.config
        ratio_T = safe_exp((logp_T - old_logp_T).detach())
        lowest = 0.0 if config.clip_low is None else 1.0 - config.clip_low
        highest = 1.0 + config.clip_high
        loss_T = -ratio_T.clamp(lowest, highest) * advantage_T * logp_T
        dtype = loss_T.dtype
        return SurrogateTerms(
            loss_T,
            (ratio_T < lowest).to(dtype),
            (ratio_T > highest).to(dtype),
            torch.zeros_like(ratio_T),
        )

"""The critic's loss: squared error to the returns, clipped near the old values.

In: values before each response token with gradient, and a MicroBatch whose tokens carry `return`
(from advantages.gae) and `value` (the critic's output at the start of the iteration, which the
advantages were computed with; needed for clipping). Out: LossOutput, this micro-batch's share of
the mean over the step's tokens. T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rayhf.losses.base import LossOutput, MicroBatch
from rayhf.losses.policy import aggregate, need


def value_loss(value_T: Tensor, old_value_T: Tensor, return_T: Tensor, clip: float) -> Tensor:
    """Return 0.5 * max((v - ret)^2, (clip(v, old - clip, old + clip) - ret)^2) per token: (T,).

    From the code of Schulman et al. 2017.
    """
    near_T = old_value_T + (value_T - old_value_T).clamp(-clip, clip)
    return 0.5 * torch.maximum((value_T - return_T).square(), (near_T - return_T).square())


def explained_variance(metrics: Mapping[str, float]) -> float:
    """Return 1 - Var(return - value) / Var(return), from ValueLoss's moments over the whole step.

    1 is a perfect critic, 0 no better than a constant. Constant returns have nothing to explain:
    0.0.
    """
    return_variance = metrics["value/return_square"] - metrics["value/return_mean"] ** 2
    error_variance = metrics["value/error_square"] - metrics["value/error_mean"] ** 2
    # The moments are float32 sums: a variance below their rounding error is noise.
    if return_variance <= 1e-6 * max(metrics["value/return_square"], 1e-12):
        return 0.0
    return 1.0 - max(error_variance, 0.0) / return_variance


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss:
    """Clipped squared error to the returns; picklable."""

    value_clip: float | None = 0.2
    """How far a value may move from the old one; None: no clipping."""

    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        """Whether entropy_T is computed, and whether it carries gradient."""
        return "off"

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        """Return this micro-batch's share. Raises ValueError for missing fields."""
        return_T = need(micro, "return")
        error_T = (return_T - output_T).detach()
        means_T = {
            "value/return_mean": return_T,
            "value/return_square": return_T.square(),
            "value/error_mean": error_T,
            "value/error_square": error_T.square(),
        }
        if self.value_clip is None:
            loss_T = 0.5 * (output_T - return_T).square()
        else:
            old_T = need(micro, "value")
            loss_T = value_loss(output_T, old_T, return_T, self.value_clip)
            moved_T = (output_T - old_T).detach().abs()
            means_T["value/clip"] = (moved_T > self.value_clip).to(output_T.dtype)
        loss = aggregate(loss_T, micro, "token_mean")
        metrics = {
            name: aggregate(values_T, micro, "token_mean") for name, values_T in means_T.items()
        }
        metrics["value/loss"] = loss.detach()
        return LossOutput(loss=loss, metrics=metrics)

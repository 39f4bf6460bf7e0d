"""Ratios of probabilities: bounded exponentials, and importance weights.

Log-probs are float32 or wider, in nats, temperature applied. T response tokens, R rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rayhf.config.algorithms import PolicyImportanceConfig
from rayhf.losses.base import MicroBatch, sum_rows

MAX_EXPONENT = 20.0
"""Nats. exp(20) is about 5e8: a larger ratio carries no information but that training broke."""


def safe_exp(x: Tensor) -> Tensor:
    """Return exp(x) up to MAX_EXPONENT and its tangent line beyond.

    Value and gradient are finite in float32 and keep their signs. A plain clamp would drop the
    gradient of exp and, in k3, leave one of the wrong sign.
    """
    bounded = x.clamp(max=MAX_EXPONENT)
    return bounded.exp() * (1.0 + (x - bounded))


def fill_unknown(behavior_logp_T: Tensor, logp_T: Tensor) -> Tensor:
    """Return behavior log-probs, with the learner's own in place of NaN (not sampled here)."""
    return torch.where(behavior_logp_T.isnan(), logp_T.detach(), behavior_logp_T)


class Importance(NamedTuple):
    """Importance weights without gradient, and whether each is bounded or masked (1.0 or 0.0)."""

    weight_T: Tensor
    capped_T: Tensor


def importance_weight(
    logp_T: Tensor, behavior_logp_T: Tensor, micro: MicroBatch, config: PolicyImportanceConfig
) -> Importance:
    """Return the weight of every token for exp(logp - behavior_logp): (T,).

    truncate: min(cap, ratio) (Ionides 2008; for the rollout-learner mismatch Yao et al. 2025).
    mask: the ratio where it is from `floor` to `cap`, else 0 (IcePop, Ling Team 2025).

    The ratio is the token's own, or one for all tokens of a row: the product over its tokens, or
    their geometric mean. `logp_T` is the learner's log-prob (old_logp, or the current one, detached
    here). Equal log-probs give exactly 1. `cap` None turns the correction off: all ones.
    """
    if config.cap is None:
        return Importance(torch.ones_like(logp_T).detach(), torch.zeros_like(logp_T).detach())
    gap_T = (logp_T - fill_unknown(behavior_logp_T, logp_T)).detach()
    if config.level != "token":
        gap_R = sum_rows(gap_T, micro)
        if config.level == "geometric":
            gap_R = gap_R / micro.length_R.clamp(min=1.0)
        gap_T = gap_R[micro.row_T]
    ratio_T = safe_exp(gap_T)
    outside_T = ratio_T > config.cap
    if config.kind == "truncate":
        return Importance(ratio_T.clamp(max=config.cap), outside_T.to(ratio_T.dtype))
    outside_T = outside_T | (ratio_T < config.smallest)
    return Importance(ratio_T.masked_fill(outside_T, 0.0), outside_T.to(ratio_T.dtype))

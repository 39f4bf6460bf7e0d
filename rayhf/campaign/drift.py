"""Distance of the policy from the one that the campaign started with, where the reference moves.

In: responses of the campaign's first iteration, which the initial policy sampled, with its
log-probs. Out: an estimate of KL(initial policy || policy). It needs no copy of that policy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayhf.types import Example, FloatArray, Row

_ROWS = 64
"""Responses that are measured."""
_MAX_EXPONENT = 20.0


def initial_rows(examples: Sequence[Example]) -> list[Row]:
    """Return rows of the first iteration's examples that were sampled in it."""
    rows = [row for e in examples if not e.iterations_back for row in e.rows]
    sampled = [row for row in rows if np.isfinite(row.tokens["behavior_logp"]).all()]
    # Evenly spaced, because the examples of one prompt stand together.
    step = max(1, len(sampled) // _ROWS)
    return sampled[::step][:_ROWS]


def drift_kl(rows: Sequence[Row], logp: Sequence[FloatArray]) -> float:
    """Return the mean over rows of KL(initial policy || policy), in nats per response.

    Per token k3 = r - 1 - log r with r = p / p_initial on tokens of the initial policy: unbiased
    and never negative (Schulman 2020), with r bounded to exp(20).
    """
    total = 0.0
    for row, now in zip(rows, logp, strict=True):
        gap = now.astype(np.float64) - row.tokens["behavior_logp"]
        total += float((np.expm1(np.minimum(gap, _MAX_EXPONENT)) - gap).sum())
    return total / len(rows)

"""Inputs and outputs of a loss.

Shapes, everywhere in rayhf/losses: T response tokens of a micro-batch laid end to end (no padding),
R rows (responses), E examples, P pairs. A tensor's name ends in its shape. Rows of one example are
neighbors; a pair is (chosen, rejected).

A micro-batch is a part of an optimizer step, so a loss never averages over its micro-batch: it sums
and divides by `Totals`, the counts of the *whole* step over all micro-batches and ranks. The result
then does not depend on sharding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counts over the whole optimizer step: every rank, every micro-batch."""

    tokens: float
    """Response tokens."""
    rows: float
    examples: float
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Sums of the examples' named scalars (NaN counts as 0), for losses that mix kinds of examples
    and need the count of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """The part of a batch that goes through the model at once."""

    tokens: Mapping[str, Tensor]
    """Named values of shape (T,)."""
    rows: Mapping[str, Tensor]
    """Named values of shape (R,)."""
    examples: Mapping[str, Tensor]
    """Named values of shape (E,)."""
    row_T: Tensor
    """Index of each token's row: int64 of shape (T,)."""
    length_R: Tensor
    """Response tokens of each row: float32 of shape (R,)."""
    example_R: Tensor
    """Index of each row's example: int64 of shape (R,)."""
    totals: Totals
    entropy_T: Tensor | None = None
    """Entropy of the policy's next-token distribution in nats, where the loss requests it."""
    reference_top_TK: Tensor | None = None
    """Log-probs of the reference's K likeliest tokens under the reference, where rows have them."""
    top_TK: Tensor | None = None
    """Log-probs of the same tokens under the policy, with gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A micro-batch's share of the step's loss and metrics."""

    loss: Tensor
    """Shares add up to the step's loss."""
    metrics: Mapping[str, Tensor]
    """Detached scalars that add up over micro-batches and ranks (divide by Totals); names ending in
    `_max` take the maximum."""


class Loss(Protocol):
    """A picklable function that the learner calls once per micro-batch."""

    @property
    def entropy(self) -> Literal["off", "metric", "loss"]:
        """Whether entropy_T is computed, and whether it carries gradient."""
        ...

    def __call__(self, output_T: Tensor, micro: MicroBatch) -> LossOutput:
        """Return the micro-batch's share of the loss.

        Args:
            output_T: with gradient, log-probs of the response tokens (policy) or values before each
                token (critic).
            micro: everything else that is known of the micro-batch.
        """
        ...


def sum_rows(values_T: Tensor, micro: MicroBatch) -> Tensor:
    """Sum token values into their rows: (T,) -> (R,)."""
    return torch.zeros_like(micro.length_R, dtype=values_T.dtype).index_add(
        0, micro.row_T, values_T
    )

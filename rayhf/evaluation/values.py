"""Values of an evaluation by prompt: its figures are their means.

A run keeps them, so that a figure has an interval, and two evaluations of the same prompts a paired
difference (statistics.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayhf.evaluation.statistics import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptValues:
    """One figure by prompt; the figure is the weighted mean."""

    metric: str
    """Whole name, as in metrics.jsonl."""
    prompt_ids: tuple[str, ...]
    """Different ones."""
    values_P: Array
    """Finite."""
    weights_P: Array
    """Positive, for example the tokens of a prompt's responses."""


def prompt_values(
    metric: str,
    prompt_ids: Sequence[str],
    values: Sequence[float | None] | Array,
    weights: Sequence[float] | None = None,
) -> PromptValues:
    """Return the values by prompt: several of one prompt become their weighted mean.

    None, a value that is not known, is left out.
    """
    totals: dict[str, float] = {}
    sums: dict[str, float] = {}
    given = [1.0] * len(prompt_ids) if weights is None else weights
    for prompt, value, weight in zip(prompt_ids, values, given, strict=True):
        if value is not None:
            totals[prompt] = totals.get(prompt, 0.0) + weight * float(value)
            sums[prompt] = sums.get(prompt, 0.0) + weight
    weights_P = np.array([*sums.values()], dtype=np.float64)
    return PromptValues(
        metric=metric,
        prompt_ids=tuple(sums),
        values_P=np.array([*totals.values()], dtype=np.float64) / weights_P,
        weights_P=weights_P,
    )

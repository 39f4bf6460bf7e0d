"""Bounds of what scorers return, whoever wrote them.

In: what a scorer returned for one completion. Out: an outcome that every later step can compute
with and store: a bounded score, or a reason of one printable line.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np

from rayhf.errors import clean_line
from rayhf.scorer.replies import bounded_replies
from rayhf.types import Failed, Invalid, Outcome, Scored

MAX_SCORE = 1e6
"""Largest magnitude of a score. Squares, and sums over an iteration, stay far within float32, in
which losses and gradients are computed."""
MAX_PART = 1e15
"""Largest magnitude of a part of a score. Parts are only stored and averaged, in float64."""
EXPECTED = f"expected a number from {-MAX_SCORE:g} to {MAX_SCORE:g}"

P = TypeVar("P", Invalid, Failed, Invalid | Failed)


def bounded(outcome: object, completions: int) -> Outcome:
    """Return the outcome of one of so many completions.

    Invalid where it is none, or its score, a part or a reply is out of bounds.
    """
    if isinstance(outcome, Invalid | Failed):
        return clean(outcome)
    if not isinstance(outcome, Scored):
        return Invalid(reason=f"the scorer returned a {type(outcome).__name__}, not an outcome")
    if not _is_within(outcome.value, MAX_SCORE):
        return Invalid(reason=f"the score is {_show(outcome.value)}; {EXPECTED}")
    for name, part in outcome.parts.items():
        if not _is_within(part, MAX_PART):
            reason = f"the part {_show(name)} is {_show(part)}; expected at most {MAX_PART:g}"
            return Invalid(reason=reason)
    floats = all(isinstance(value, float) for value in (outcome.value, *outcome.parts.values()))
    if floats and not outcome.replies:
        return outcome
    try:
        replies = bounded_replies(outcome.replies, completions)
    except ValueError as error:
        return Invalid(reason=str(error))
    parts = {str(name): float(part) for name, part in outcome.parts.items()}
    return Scored(value=float(outcome.value), parts=parts, replies=replies)


def clean(problem: P) -> P:
    """Return the problem with a reason that can be stored and printed."""
    reason = clean_line(str(problem.reason))
    return problem if reason == problem.reason else replace(problem, reason=reason)


def _is_within(value: object, limit: float) -> bool:
    # Compared before the conversion: an integer may be beyond the range of a float.
    if not isinstance(value, int | float | np.integer | np.floating):
        return False
    return bool(-limit <= value <= limit)  # False for NaN


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"an integer of {value.bit_length()} bits"
    return clean_line(repr(value), 80)

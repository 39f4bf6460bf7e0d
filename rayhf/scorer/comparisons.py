"""Comparisons of one prompt's K answers: built, read and checked the same way by every engine.

In: outcomes (pointwise) or the verdicts on pairs (pairwise). Out: Comparisons whose matrix is
mirrored (win[j, i] = 1 - win[i, j]), has 1/2 on the diagonal and NaN where nothing is known of a
pair. Where nothing is known of any pair, there is no matrix but a reason. `check_outcomes` and
`check_comparisons` stand behind every engine: a wrong count or shape is Failed, a value that is
none is Invalid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from rayhf.types import (
    Compared,
    Comparison,
    Failed,
    Invalid,
    Outcome,
    Scored,
    ScoreRequest,
    win_rates,
)

Matrix = npt.NDArray[np.float64]
Pair = tuple[int, int]
_MIRROR_TOLERANCE = 1e-6


def compare_scores(outcomes: Sequence[Outcome]) -> Comparison:
    """win[i, j] = sigmoid(score_i - score_j), source "pointwise". Rows and columns of an answer
    without a score are NaN, but for the diagonal; with fewer than two scores (of several answers)
    the comparison is Failed or Invalid, as the first such answer."""
    scores_K = np.array(
        [outcome.value if isinstance(outcome, Scored) else math.nan for outcome in outcomes],
        dtype=np.float64,
    )
    missing = [outcome for outcome in outcomes if not isinstance(outcome, Scored)]
    if missing and np.isfinite(scores_K).sum() < 2:
        return missing[0]
    with np.errstate(over="ignore", invalid="ignore"):
        gap_KK = scores_K[:, None] - scores_K[None, :]
        win_KK = np.exp(-np.logaddexp(0.0, -gap_KK))
    np.fill_diagonal(win_KK, 0.5)
    return Compared(win=win_KK, source="pointwise")


def compare_pairs(answers: int, verdicts: Mapping[Pair, float | Invalid | Failed]) -> Comparison:
    """A matrix out of P(i beats j) for some i < j, source "pairwise"; where none is known, the
    first reason."""
    win_KK = np.full((answers, answers), np.nan)
    np.fill_diagonal(win_KK, 0.5)
    for (first, second), verdict in verdicts.items():
        if isinstance(verdict, float):
            win_KK[first, second], win_KK[second, first] = verdict, 1.0 - verdict
    reasons = [verdict for verdict in verdicts.values() if not isinstance(verdict, float)]
    if reasons and not knows_a_pair(win_KK):
        return reasons[0]
    return Compared(win=win_KK, source="pairwise")


def knows_a_pair(win_KK: Matrix) -> bool:
    """Whether any two answers were compared; true for fewer than two answers, where there is
    nothing to know."""
    return len(win_KK) < 2 or bool(np.isfinite(win_KK[~np.eye(len(win_KK), dtype=bool)]).any())


def mean_wins(comparison: Comparison, answers: int) -> tuple[Outcome, ...]:
    """Return the score of each answer: its win rate against the prompt's other answers.

    Invalid for an answer that stands alone or was compared with no other one.
    """
    if not isinstance(comparison, Compared):
        return (comparison,) * answers
    missing = Invalid(
        reason="a pairwise scorer compares answers to the same prompt, and this one stands alone"
        if answers == 1
        else "no verdict against any other answer"
    )
    return tuple(
        Scored(value=float(rate)) if np.isfinite(rate) else missing
        for rate in win_rates(comparison.win, include_self=False)
    )


def check_outcomes(
    answers: Sequence[Sequence[Outcome]], requests: Sequence[ScoreRequest]
) -> list[tuple[Outcome, ...]]:
    """One outcome per completion, whatever the engine returned: a wrong count is Failed, a score
    that is not finite Invalid."""
    if len(answers) != len(requests):
        failed = Failed(reason=f"the scorer answered {len(answers)} of {len(requests)} requests")
        return [(failed,) * len(request.completions) for request in requests]
    return [
        _check_row(row, len(request.completions))
        for row, request in zip(answers, requests, strict=True)
    ]


def _check_row(row: Sequence[Outcome], completions: int) -> tuple[Outcome, ...]:
    if len(row) != completions:
        return (
            Failed(reason=f"the scorer gave {len(row)} scores for {completions} answers"),
        ) * completions
    return tuple(
        Invalid(reason=f"the score is {outcome.value}")
        if isinstance(outcome, Scored) and not math.isfinite(outcome.value)
        else outcome
        for outcome in row
    )


def check_comparisons(
    answers: Sequence[Comparison], requests: Sequence[ScoreRequest]
) -> list[Comparison]:
    """One comparison per request, whatever the engine returned. A wrong count or shape, and a
    matrix that is not one of win probabilities, is Failed."""
    if len(answers) != len(requests):
        return [
            Failed(reason=f"the scorer answered {len(answers)} of {len(requests)} requests")
        ] * len(requests)
    return [
        _check_matrix(answer, len(request.completions))
        for answer, request in zip(answers, requests, strict=True)
    ]


def _check_matrix(comparison: Comparison, answers: int) -> Comparison:
    if not isinstance(comparison, Compared):
        return comparison
    win_KK = comparison.win
    if win_KK.shape != (answers, answers):
        return Failed(
            reason=f"the scorer's matrix has shape {win_KK.shape}, expected {(answers, answers)}"
        )
    known = ~np.isnan(win_KK)
    if not ((win_KK[known] >= 0.0) & (win_KK[known] <= 1.0)).all():
        worst = win_KK[known][np.argmax(np.abs(win_KK[known] - 0.5))]
        return Failed(reason=f"the scorer's matrix has the entry {worst:g}, expected probabilities")
    off_KK = np.abs(win_KK + win_KK.T - 1.0)
    if (known != known.T).any() or (off_KK[known] > _MIRROR_TOLERANCE).any():
        return Failed(
            reason="the scorer's matrix is not mirrored: win[i, j] + win[j, i] must be 1, and 1/2 on the diagonal"
        )
    if not knows_a_pair(win_KK):
        return Invalid(reason="the scorer compared no two answers")
    return comparison

"""Comparisons of one prompt's K completions: built, read and checked in one place.

In: outcomes (pointwise) or verdicts on pairs (pairwise). Out: Comparisons whose matrix is mirrored
(win[j, i] = 1 - win[i, j]), with 1/2 on the diagonal and NaN where nothing is known of a pair.
Where nothing is known of any pair, there is no matrix but a reason. `check_outcomes` and
`check_comparisons` stand behind every scorer: a wrong count or shape is Failed, a value out of
bounds is Invalid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from rayhf.scorer.outcomes import bounded, clean
from rayhf.scorer.replies import Replies, bounded_replies
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
Problem = Invalid | Failed
_MIRROR_TOLERANCE = 1e-6


def compare_scores(outcomes: Sequence[Outcome]) -> Comparison:
    """Return win[i, j] = sigmoid(score_i - score_j), source "pointwise".

    Rows and columns of a completion without a score are NaN off the diagonal. With fewer than two
    scores (of several completions) the comparison is Failed or Invalid, as the first such outcome.
    """
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
    replies = tuple(o.replies if isinstance(o, Scored) else () for o in outcomes)
    return Compared(win=win_KK, source="pointwise", replies=replies if any(replies) else ())


def compare_pairs(
    completions: int,
    verdicts: Mapping[Pair, float | Problem],
    replies: tuple[Replies, ...] = (),
) -> Comparison:
    """Return a matrix from P(i beats j) of some pairs i < j, source "pairwise".

    Where no pair has a probability, return the first problem. `replies` are as in Compared.
    """
    win_KK = np.full((completions, completions), np.nan)
    np.fill_diagonal(win_KK, 0.5)
    for (first, second), verdict in verdicts.items():
        if isinstance(verdict, float):
            win_KK[first, second] = verdict
            win_KK[second, first] = 1.0 - verdict
    problems = [verdict for verdict in verdicts.values() if not isinstance(verdict, float)]
    if problems and not has_verdict(win_KK):
        return problems[0]
    return Compared(win=win_KK, source="pairwise", replies=replies)


def has_verdict(win_KK: Matrix) -> bool:
    """Return whether any two completions were compared; true for fewer than two."""
    return len(win_KK) < 2 or bool(np.isfinite(win_KK[~np.eye(len(win_KK), dtype=bool)]).any())


def mean_wins(
    comparison: Comparison, completions: int, problems: Mapping[int, Problem] | None = None
) -> tuple[Outcome, ...]:
    """Return the scores of a pairwise scorer: win rates against the prompt's other completions.

    A completion without any verdict is its entry in `problems` where it has one, otherwise Invalid.
    """
    if not isinstance(comparison, Compared):
        return (comparison,) * completions
    missing = Invalid(
        reason="no verdict against any other completion"
        if completions > 1
        else "a pairwise scorer needs at least two completions of a prompt, and there is no other "
        "completion here"
    )
    return tuple(
        Scored(value=float(rate), replies=comparison.replies_about(index))
        if math.isfinite(rate)
        else (problems or {}).get(index, missing)
        for index, rate in enumerate(win_rates(comparison.win, include_self=False))
    )


def check_outcomes(
    responses: Sequence[Sequence[Outcome]], requests: Sequence[ScoreRequest]
) -> list[tuple[Outcome, ...]]:
    """Return one outcome per completion, whatever the scorer returned.

    A wrong count is Failed, and a score or part that is not a number within its bound Invalid
    (outcomes.py).
    """
    if len(responses) != len(requests):
        failed = _wrong_count(len(responses), len(requests))
        return [(failed,) * len(request.completions) for request in requests]
    return [
        _check_row(row, len(request.completions))
        for row, request in zip(responses, requests, strict=True)
    ]


def _wrong_count(responses: int, requests: int) -> Failed:
    return Failed(reason=f"the scorer returned {responses} results for {requests} requests")


def _check_row(row: Sequence[Outcome], completions: int) -> tuple[Outcome, ...]:
    if len(row) != completions:
        failed = Failed(
            reason=f"the scorer returned {len(row)} scores for {completions} completions"
        )
        return (failed,) * completions
    return tuple(bounded(outcome, completions) for outcome in row)


def check_comparisons(
    responses: Sequence[Comparison], requests: Sequence[ScoreRequest]
) -> list[Comparison]:
    """Return one comparison per request, whatever the scorer returned.

    A wrong count or shape, and a matrix that does not hold win probabilities, is Failed.
    """
    if len(responses) != len(requests):
        return [_wrong_count(len(responses), len(requests))] * len(requests)
    return [
        _check_matrix(response, len(request.completions))
        for response, request in zip(responses, requests, strict=True)
    ]


def _check_matrix(comparison: object, completions: int) -> Comparison:
    if isinstance(comparison, Invalid | Failed):
        return clean(comparison)
    if not isinstance(comparison, Compared):
        kind = type(comparison).__name__
        return Failed(reason=f"the scorer returned a {kind}, not a comparison")
    win_KK = comparison.win
    expected = (completions, completions)
    if win_KK.shape != expected:
        return Failed(reason=f"the scorer's matrix has shape {win_KK.shape}, expected {expected}")
    known = ~np.isnan(win_KK)
    if not ((win_KK[known] >= 0.0) & (win_KK[known] <= 1.0)).all():
        worst = win_KK[known][np.argmax(np.abs(win_KK[known] - 0.5))]
        return Failed(reason=f"the scorer's matrix has the entry {worst:g}, expected probabilities")
    error_KK = np.abs(win_KK + win_KK.T - 1.0)
    if (known != known.T).any() or (error_KK[known] > _MIRROR_TOLERANCE).any():
        return Failed(
            reason="the scorer's matrix is not mirrored: win[i, j] + win[j, i] must be 1, and 1/2 "
            "on the diagonal"
        )
    if not has_verdict(win_KK):
        return Invalid(reason="the scorer compared no two completions")
    return _check_replies(comparison, completions)


def _check_replies(compared: Compared, completions: int) -> Comparison:
    if not compared.replies:
        return compared
    if len(compared.replies) != completions:
        return Failed(
            reason=f"the scorer returned replies about {len(compared.replies)} completions, "
            f"expected {completions}"
        )
    try:
        replies = tuple(bounded_replies(each, completions) for each in compared.replies)
    except ValueError as error:
        return Failed(reason=str(error))
    return replace(compared, replies=replies)

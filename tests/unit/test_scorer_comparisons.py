"""Matrices of win probabilities, against sigmoids and means by hand."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from score_requests import request, scored, win_of

from rayhf.scorer.comparisons import (
    check_comparisons,
    check_outcomes,
    compare_pairs,
    compare_scores,
    mean_wins,
)
from rayhf.scorer.outcomes import EXPECTED
from rayhf.types import Compared, Failed, Invalid, Outcome, Scored

NAN = math.nan


def test_differences_of_scores_by_hand() -> None:
    compared = compare_scores(scored(0.0, 1.0, -2.0))
    up, down = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))
    over = 1 / (1 + math.exp(-2))
    wanted = [[0.5, 1 - up, over], [up, 0.5, down], [1 - over, 1 - down, 0.5]]
    np.testing.assert_allclose(win_of(compared), wanted, atol=1e-15)
    assert isinstance(compared, Compared) and compared.source == "pointwise"


@given(st.lists(st.floats(-1e308, 1e308), min_size=1, max_size=6), st.randoms())
def test_matrix_of_scores_is_mirrored_and_follows_their_order(
    values: list[float], random: object
) -> None:
    win = win_of(compare_scores(scored(*values)))
    np.testing.assert_allclose(win + win.T, 1.0, atol=1e-15)
    assert (np.diag(win) == 0.5).all() and ((win >= 0) & (win <= 1)).all()
    order = list(range(len(values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(
        win_of(compare_scores(scored(*(values[i] for i in order)))), win[np.ix_(order, order)]
    )


def test_small_probabilities_are_not_rounded_to_zero() -> None:
    win = win_of(compare_scores(scored(40.0, 0.0)))
    assert win[1, 0] == pytest.approx(math.exp(-40), rel=1e-12)


@pytest.mark.parametrize("tied", [(3.0,), (2.0, 2.0, 2.0), ()])
def test_ties_one_completion_and_none(tied: tuple[float, ...]) -> None:
    np.testing.assert_array_equal(
        win_of(compare_scores(scored(*tied))), np.full((len(tied), len(tied)), 0.5)
    )


def test_completion_without_a_score_has_no_row() -> None:
    win = win_of(compare_scores([Scored(value=1.0), Invalid(reason="nan"), Scored(value=1.0)]))
    np.testing.assert_array_equal(win, [[0.5, NAN, 0.5], [NAN, 0.5, NAN], [0.5, NAN, 0.5]])


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ((Failed(reason="late"), Invalid(reason="nan")), Failed(reason="late")),
        ((Scored(value=1.0), Invalid(reason="nan")), Invalid(reason="nan")),
        ((Invalid(reason="nan"),), Invalid(reason="nan")),
    ],
)
def test_without_a_pair_of_scores_there_is_no_comparison(
    outcomes: tuple[Outcome, ...], wanted: Outcome
) -> None:
    assert compare_scores(outcomes) == wanted


def test_verdicts_on_pairs_are_mirrored_and_cycles_kept() -> None:
    compared = compare_pairs(3, {(0, 1): 0.9, (1, 2): 0.9, (0, 2): 0.1})
    np.testing.assert_allclose(
        win_of(compared), [[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]]
    )
    assert isinstance(compared, Compared) and compared.source == "pairwise"
    assert mean_wins(compared, 3) == tuple(Scored(value=pytest.approx(0.5)) for _ in range(3))


def test_unknown_pair_is_nan_and_left_out_of_the_mean() -> None:
    compared = compare_pairs(3, {(0, 1): 0.9, (1, 2): Invalid(reason="?"), (0, 2): 0.2})
    np.testing.assert_allclose(
        win_of(compared), [[0.5, 0.9, 0.2], [0.1, 0.5, NAN], [0.8, NAN, 0.5]]
    )
    assert [
        outcome.value for outcome in mean_wins(compared, 3) if isinstance(outcome, Scored)
    ] == pytest.approx([0.55, 0.1, 0.8])


def test_comparison_without_verdicts_has_a_reason() -> None:
    nothing = compare_pairs(2, {(0, 1): Failed(reason="died")})
    assert nothing == Failed(reason="died")
    assert mean_wins(nothing, 2) == (Failed(reason="died"),) * 2


def test_single_completion_has_no_mean_win() -> None:
    [outcome] = mean_wins(compare_pairs(1, {}), 1)
    assert isinstance(outcome, Invalid) and "there is no other completion" in outcome.reason


def test_wrong_counts_are_failed_and_nan_is_invalid() -> None:
    requests = [request("a", "b"), request("c")]
    assert check_outcomes([scored(1.0)], requests) == [
        (Failed(reason="the scorer returned 1 results for 2 requests"),) * 2,
        (Failed(reason="the scorer returned 1 results for 2 requests"),),
    ]
    assert check_outcomes([scored(1.0), scored(2.0)], requests) == [
        (Failed(reason="the scorer returned 1 scores for 2 completions"),) * 2,
        scored(2.0),
    ]
    assert check_outcomes([scored(NAN, 1.0), scored(math.inf)], requests) == [
        (Invalid(reason=f"the score is nan; {EXPECTED}"), Scored(value=1.0)),
        (Invalid(reason=f"the score is inf; {EXPECTED}"),),
    ]


@pytest.mark.parametrize(
    ("win", "kind", "reason"),
    [
        (np.full((2, 3), 0.5), Failed, r"shape \(2, 3\), expected \(2, 2\)"),
        (np.full(4, 0.5), Failed, r"shape \(4,\), expected \(2, 2\)"),
        (np.array([[0.5, 1.5], [-0.5, 0.5]]), Failed, "has the entry 1.5, expected probabilities"),
        (np.array([[0.5, math.inf], [0.5, 0.5]]), Failed, "has the entry inf"),
        (np.array([[0.5, 0.9], [0.9, 0.5]]), Failed, "is not mirrored"),
        (np.array([[1.0, 0.9], [0.1, 0.0]]), Failed, "is not mirrored"),
        (np.array([[0.5, 0.9], [NAN, 0.5]]), Failed, "is not mirrored"),
        (np.array([[0.5, NAN], [NAN, 0.5]]), Invalid, "compared no two completions"),
    ],
)
def test_invalid_matrix_is_refused(win: np.ndarray, kind: type, reason: str) -> None:
    [checked] = check_comparisons([Compared(win=win, source="pairwise")], [request("a", "b")])
    assert isinstance(checked, kind)
    assert not isinstance(checked, Compared)
    assert re.search(reason, checked.reason)


def test_missing_matrix_is_failed() -> None:
    assert check_comparisons([], [request("a", "b")]) == [
        Failed(reason="the scorer returned 0 results for 1 requests")
    ]

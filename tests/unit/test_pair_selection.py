"""Which scored answers become pairs, win rates, and their invariances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayhf.algorithms import pair_selection as pairing
from rayhf.types import win_rates

SCORES = st.lists(st.floats(-5, 5), min_size=0, max_size=6)


def test_best_second_skips_copies_of_the_best():
    assert pairing.best_second([1.0, 3.0, 2.0]).pairs == (
        pairing.ScoredPair(chosen=1, rejected=2, margin=1.0),
    )
    same = pairing.best_second([1.0, 3.0, 2.9], completions=["a", "b", "b"])
    assert same.pairs == (pairing.ScoredPair(chosen=1, rejected=0, margin=2.0),)
    assert pairing.best_second([1.0, 1.0]).ties == 1 and pairing.best_second([1.0]).ties == 0


def test_a_length_penalty_can_turn_a_ranking_round():
    assert pairing.length_penalized([1.0, 0.9], [100, 10], 0.01) == pytest.approx([0.0, 0.8])
    with pytest.raises(ValueError, match="lengths"):
        pairing.length_penalized([1.0], [1, 2], 0.1)


def test_rejection_sampling_at_low_temperature_keeps_the_best_and_at_high_a_random_subset():
    scores = [0.0, 3.0, 1.0, 2.0]
    cold = {
        tuple(sorted(pairing.rso_accept(scores, 0.01, 2, np.random.default_rng(s))))
        for s in range(20)
    }
    assert cold == {(1, 3)}
    hot = [pairing.rso_accept(scores, 1e9, 2, np.random.default_rng(s)) for s in range(200)]
    counts = np.bincount([i for pick in hot for i in pick], minlength=4) / 200
    assert counts == pytest.approx([0.5] * 4, abs=0.12)
    assert pairing.rso_accept([], 1.0, 2, np.random.default_rng(0)) == []


def test_rejection_sampling_follows_the_acceptance_probability():
    """The first accepted of two answers: p(better) = 1 / (1 + exp(-gap / temperature)) by algorithm
    1's geometric trials."""
    gap = 1.0
    first = [
        pairing.rso_accept([0.0, gap], 1.0, 1, np.random.default_rng(s))[0] for s in range(4000)
    ]
    assert np.mean(first) == pytest.approx(1 / (1 + np.exp(-gap)), abs=0.03)


def test_neighbours_of_the_accepted_make_pairs():
    found = pairing.adjacent_pairs([2, 0, 1], [1.0, 5.0, 3.0])
    assert (
        found.pairs == (pairing.ScoredPair(chosen=2, rejected=0, margin=2.0),) and found.ties == 0
    )


def test_win_rates_by_hand():
    win = np.array([[0.5, 1.0, 0.0], [0.0, 0.5, 0.75], [1.0, 0.25, 0.5]])
    assert win_rates(win, include_self=True) == pytest.approx([0.5, 1.25 / 3, 1.75 / 3])
    win[0, 1] = win[1, 0] = np.nan
    assert win_rates(win, include_self=True) == pytest.approx([0.25, 0.625, 1.75 / 3])
    lonely = np.full((2, 2), np.nan)
    np.fill_diagonal(lonely, 0.5)
    assert np.isnan(win_rates(lonely, include_self=True)).all()
    assert (
        win_rates(np.array([[0.5]]), include_self=True) == pytest.approx([0.5])
        and win_rates(np.zeros((0, 0)), include_self=True).size == 0
    )
    with pytest.raises(ValueError, match="square"):
        win_rates(np.zeros((2, 3)), include_self=True)


def test_win_rates_against_the_others_alone():
    win = np.array([[0.5, 1.0, 0.0], [0.0, 0.5, 0.75], [1.0, 0.25, 0.5]])
    assert win_rates(win, include_self=False) == pytest.approx([0.5, 0.375, 0.625])
    win[0, 1] = win[1, 0] = np.nan
    assert win_rates(win, include_self=False) == pytest.approx([0.0, 0.75, 0.625])
    assert np.isnan(win_rates(np.array([[0.5]]), include_self=False)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_win_rates_have_mean_one_half_and_follow_a_permutation(k, seed):
    rng = np.random.default_rng(seed)
    upper = rng.random((k, k))
    win = np.triu(upper, 1) + np.tril(1 - upper.T, -1) + 0.5 * np.eye(k)
    rates = win_rates(win, include_self=True)
    order = rng.permutation(k)
    assert rates.mean() == pytest.approx(0.5)
    assert win_rates(win[np.ix_(order, order)], include_self=True) == pytest.approx(rates[order])


@settings(max_examples=60, deadline=None)
@given(SCORES, st.integers(0, 100))
def test_no_rule_ever_prefers_the_lower_score(scores, seed):
    rng = np.random.default_rng(seed)
    order = pairing.rso_accept(scores, 1.0, 4, rng)
    for found in (
        pairing.best_second(scores),
        pairing.adjacent_pairs(order, scores),
        pairing.best_worst(scores),
    ):
        assert all(scores[p.chosen] > scores[p.rejected] for p in found.pairs)
    assert pairing.best_second([1.5] * len(scores)).pairs == ()

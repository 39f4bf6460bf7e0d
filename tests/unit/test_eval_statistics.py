"""Arithmetic of evaluations: pass@k, maj@k, intervals, win rates, rankings, best of n, rewards."""

import math
from itertools import combinations

import numpy as np
import pytest

from rayhf.evaluation.best_of_n import best_of_n_curve
from rayhf.evaluation.reward_quality import (
    JudgedPair,
    accuracy,
    annotator_accuracy,
    by_category,
    calibration_error,
    format_bias,
    ideal_accuracy,
    length_bias,
    markup_count,
    reliability,
    section_scores,
)
from rayhf.evaluation.series import prompt_figures
from rayhf.evaluation.statistics import (
    bootstrap,
    difference_of_means,
    majority_at_k,
    mean_estimate,
    mean_estimates,
    pass_at_k,
)
from rayhf.evaluation.values import prompt_values
from rayhf.evaluation.win_rates import (
    Duels,
    bradley_terry,
    length_controlled,
    length_controlled_difference,
    ties,
    win_rate,
)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (6, 1, 6)])
def test_pass_at_k_is_the_share_of_subsets(n, c, k):
    subsets = list(combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([max(subset) for subset in subsets]))


def test_more_samples_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="pass@3 needs at least 3 samples"):
        pass_at_k(2, 1, 3)


@pytest.mark.parametrize(
    ("answers", "scores", "expected"),
    [
        (["7", "7", "8"], [1, 1, 0], 1.0),
        (["8", "8", "7"], [0, 0, 1], 0.0),
        (["7", "8"], [1, 0], 0.5),
        (["7", None, None], [1, 0, 0], 1.0),
        ([None, None], [0, 0], 0.0),
    ],
)
def test_majority_vote(answers, scores, expected):
    assert majority_at_k(answers, scores, len(answers)) == expected


def test_majority_of_subsets_is_their_mean():
    answers = ["7", "7", "7", "8", "8"]
    scores = [1, 1, 1, 0, 0]
    exact = np.mean(
        [
            majority_at_k([answers[i] for i in s], [scores[i] for i in s], 3)
            for s in combinations(range(5), 3)
        ]
    )
    assert majority_at_k(answers, scores, 3) == pytest.approx(exact, abs=0.08)
    assert majority_at_k(answers, scores, 3) == majority_at_k(answers, scores, 3)


def test_interval_covers_the_mean_and_clusters_by_prompt():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        by_prompt = random.normal(0.3, 1.0, size=40)
        estimate = mean_estimate(by_prompt)
        covered += estimate.low <= 0.3 <= estimate.high
    assert 85 <= covered <= 100
    # Eight equal samples of a prompt say no more than one.
    once = mean_estimate(by_prompt)
    assert (once.high - once.low) == pytest.approx(2 * 1.96 * by_prompt.std() / 40**0.5, rel=0.15)


def test_one_prompt_has_no_interval():
    estimate = mean_estimate([0.5])
    assert estimate.interval == "unknown" and estimate.to_json()["low"] is None


def test_weights_make_instruction_level_means():
    assert mean_estimate([1.0, 0.5], [1, 2]).value == pytest.approx(2 / 3)


def test_figures_of_samples_leave_out_what_has_no_score():
    scores = np.array([[1, 0, 1, np.nan], [0, 0, 0, 0]])
    answers = [["7", "8", "7", "9"], ["1", "2", "3", "4"]]
    figures = prompt_figures(scores, answers, (1, 3, 4))
    assert set(figures) == {"mean", "pass@1", "pass@3", "pass@4", "maj@1", "maj@3", "maj@4"}
    assert figures["mean"].tolist() == pytest.approx([2 / 3, 0])
    assert figures["pass@3"].tolist() == [1, 0] and math.isnan(figures["pass@4"][0])
    assert figures["maj@3"][0] == 1
    graded = prompt_figures(np.array([[0.5, 1.0]]), None, (1, 2))
    assert set(graded) == {"mean"}


# ---------------------------------------------------------------------------------------- win rates


def duels(win, gap, prompts=None):
    win = np.asarray(win, dtype=float)
    numbers = np.arange(len(win)) if prompts is None else np.asarray(prompts)
    return Duels(win_D=win, length_gap_D=np.asarray(gap, dtype=float), prompt_D=numbers)


def test_ties_are_half_a_win():
    some = duels([1, 0.5, 0, 0.5], [1, 2, 3, 4])
    assert win_rate(some).value == 0.5 and ties(some) == 0.5


def test_wins_by_length_alone_vanish_when_lengths_are_controlled():
    random = np.random.default_rng(1)
    gap = random.normal(200, 300, size=400)
    win = (random.random(400) < 1 / (1 + np.exp(-4 * np.tanh(gap / gap.std())))).astype(float)
    raw = win_rate(duels(win, gap))
    controlled = length_controlled(duels(win, gap))
    assert raw.low > 0.6
    assert controlled.low < 0.5 < controlled.high


def test_equal_lengths_leave_the_raw_win_rate():
    some = duels([1, 1, 0, 0.5], [0, 0, 0, 0])
    assert length_controlled(some).value == pytest.approx(win_rate(some).value, abs=1e-6)


def test_difference_of_length_controlled_win_rates_is_paired():
    random = np.random.default_rng(2)
    win = random.random(60)
    gap = random.normal(0, 100, size=60)
    before = duels(0.9 * win, gap)
    after = duels(0.9 * win + 0.1, gap + 50)
    difference = length_controlled_difference(before, after)
    each = [length_controlled(one) for one in (before, after)]
    assert difference.value == pytest.approx(each[1].value - each[0].value)
    assert difference.low > 0.05 and difference.high < 0.15
    assert difference.high - difference.low < 0.6 * (each[1].high - each[1].low)


def test_ranking_finds_the_strengths():
    strengths = np.array([1.0, 0.0, -1.0])
    wins = 1 / (1 + np.exp(-(strengths[:, None] - strengths[None, :])))
    by_prompt = np.repeat((wins * (1 - np.eye(3)))[None], 3000, axis=0)
    ranked = bradley_terry(by_prompt, ["a", "b", "c"], resamples=20)
    assert [each.name for each in ranked] == ["a", "b", "c"]
    np.testing.assert_allclose([e.strength.value for e in ranked], strengths, atol=2e-3)
    assert ranked[0].rating == pytest.approx(1000 + 400 / math.log(10), abs=1)


def test_ranking_of_one_that_always_wins_is_finite():
    by_prompt = np.zeros((10, 2, 2))
    by_prompt[:, 0, 1] = 1
    first, second = bradley_terry(by_prompt, ["a", "b"], resamples=50)
    assert first.name == "a" and math.isfinite(first.strength.high)
    # One tie more: 10.5 wins of 11.
    assert first.strength.value - second.strength.value == pytest.approx(math.log(10.5 / 0.5))


def test_ranking_needs_connected_comparisons():
    by_prompt = np.zeros((3, 4, 4))
    by_prompt[:, 0, 1] = by_prompt[:, 2, 3] = 1
    with pytest.raises(ValueError, match="c, d shares no comparison"):
        bradley_terry(by_prompt, ["a", "b", "c", "d"])


# ---------------------------------------------------------------------------------------- best of n


def test_best_of_n_is_the_mean_over_subsets():
    random = np.random.default_rng(2)
    proxy = random.normal(size=(3, 5))
    judge = random.normal(size=(3, 5))
    for point in best_of_n_curve(proxy, judge, (1, 2, 4, 5)):
        subsets = list(combinations(range(5), point.n))
        best = [[max(s, key=lambda i: proxy[p][i]) for s in subsets] for p in range(3)]
        exact = np.mean([[judge[p][i] for i in row] for p, row in enumerate(best)])
        assert point.judge.value == pytest.approx(exact)
        assert point.kl == pytest.approx(math.log(point.n) - (point.n - 1) / point.n)
    assert best_of_n_curve(proxy, judge, (1,))[0].gain.value == pytest.approx(0)


# ------------------------------------------------------------------------------------ reward models


def pair(win, chosen="a", rejected="b", **facts):
    return JudgedPair(win=win, chosen=chosen, rejected=rejected, **facts)


def test_accuracy_counts_a_tie_as_wrong():
    pairs = [pair(0.9, category="x"), pair(0.5, category="x"), pair(0.2, category="y")]
    assert accuracy(pairs).value == pytest.approx(1 / 3)
    assert {k: v.value for k, v in by_category(pairs).items()} == {"x": 0.5, "y": 0}


def test_sections_are_weighted_by_the_benchmarks_counts():
    pairs = [pair(0.9, category="x"), pair(0.1, category="x"), pair(0.9, category="y")]
    pairs.append(pair(0.9, category="z"))
    sections = {"one": ["x", "y"], "two": ["z"], "absent": ["w"]}
    scores = section_scores(pairs, sections, {"x": 30, "y": 10, "z": 5, "w": 9})
    assert scores["one"].value == pytest.approx((30 * 0.5 + 10) / 40)
    assert scores["score"].value == pytest.approx((0.625 + 1) / 2)
    assert set(scores) == {"one", "two", "score"}


def test_ideal_accuracy_bounds_the_agreement_with_annotators():
    pairs = [pair(0.9, agreement=0.75), pair(0.1, agreement=0.25), pair(0.9)]
    assert ideal_accuracy(pairs).value == 0.75 and annotator_accuracy(pairs).value == 0.75
    assert ideal_accuracy([pair(0.9)]) is None


def test_calibration():
    random = np.random.default_rng(3)
    truth = random.uniform(0.5, 1, size=4000)
    right = random.random(4000) < truth
    honest = [pair(p if r else 1 - p) for p, r in zip(truth, right, strict=True)]
    assert calibration_error(honest).value < 0.03
    certain = [pair(0.999 if r else 0.001) for r in right]
    assert calibration_error(certain).value == pytest.approx(0.25, abs=0.02)
    table = reliability(honest)
    assert sum(row.count for row in table) == 4000
    assert all(row.accuracy.low - 0.02 < row.confidence < row.accuracy.high + 0.02 for row in table)


def test_length_and_format_bias():
    short, long = "brief", "a much longer answer"
    pairs = [pair(0.9, long, short), pair(0.1, short, long)] * 5  # always for the longer one
    bias = length_bias(pairs)
    assert bias["prefers_longer"].value == 1 and bias["labels_prefer_longer"].value == 0.5
    assert bias["excess_longer"].value == 0.5
    assert bias["accuracy_chosen_longer"].value == 1 and bias["accuracy_rejected_longer"].value == 0
    assert format_bias(pairs) == {}
    listed = "# Title\n- one\n- **two**\n1. three"
    assert markup_count(listed) == 5 and markup_count("2 - 1 is *one*") == 0
    assert format_bias([pair(0.9, "x", listed)])["prefers_more_markup"].value == 0


def test_joint_means_are_the_bootstrap_of_each():
    rng = np.random.default_rng(3)
    values_MP = rng.random((3, 40))
    weights_MP = rng.random((3, 40))
    for estimate, values, weights in zip(
        mean_estimates(values_MP, weights_MP), values_MP, weights_MP, strict=True
    ):
        single = bootstrap(
            lambda chosen, v=values, w=weights: float(np.average(v[chosen], weights=w[chosen])), 40
        )
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx(
            (single.value, single.low, single.high)
        )


def test_change_between_different_prompts():
    rng = np.random.default_rng(4)
    before = (rng.random(200), np.ones(200))
    after = (rng.random(100) + 1.0, np.ones(100))
    change = difference_of_means(before, after)
    error = math.sqrt(1 / 12 / 200 + 1 / 12 / 100)
    assert change.low < 1.0 < change.high
    assert change.high - change.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_values_of_one_prompt_are_merged():
    merged = prompt_values("m", ["a", "b", "a", "c"], [1.0, 5.0, 0.0, None], [3.0, 1.0, 1.0, 1.0])
    assert merged.prompt_ids == ("a", "b")
    assert merged.values_P.tolist() == [0.75, 5.0] and merged.weights_P.tolist() == [4.0, 1.0]

"""Advantages and pair selection against the equations in plain Python, and their invariances."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayhf.algorithms import advantages as credit
from rayhf.algorithms import pair_selection as pairing
from rayhf.algorithms.coefficients import AdaptiveKL
from rayhf.errors import ConfigError

SCORE = st.floats(-100, 100, allow_nan=False)
SCORES = st.lists(SCORE, max_size=8)
REWARDS = st.lists(st.tuples(SCORE, SCORE), max_size=10)


@given(row=REWARDS, gamma=st.floats(0.5, 1.0), lam=st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_gae_is_the_sum_of_discounted_deltas(
    row: list[tuple[float, float]], gamma: float, lam: float
) -> None:
    """Eq. 16 of the paper as a double sum, without the recursion."""
    r, v = [a for a, _ in row], [b for _, b in row]
    after = [*v[1:], 0.0] if v else []
    deltas = [r[t] + gamma * after[t] - v[t] for t in range(len(r))]
    expected = [
        sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(r))) for t in range(len(r))
    ]
    advantage, returns = credit.gae(r, v, [len(r)], gamma, lam)
    assert advantage.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert returns.tolist() == pytest.approx(
        [a + b for a, b in zip(expected, v, strict=True)], rel=1e-9, abs=1e-9
    )


def test_gae_limits() -> None:
    """lambda 1 is the Monte-Carlo return, lambda 0 the one-step error; values of a perfect critic
    leave no advantage.
    """
    r, v = [0.0, 1.0, 2.0], [5.0, -1.0, 0.5]
    assert credit.gae(r, v, [3], 1.0, 1.0)[1].tolist() == [3.0, 3.0, 2.0]
    assert credit.gae(r, v, [3], 1.0, 0.0)[0].tolist() == [-6.0, 2.5, 1.5]
    assert credit.gae(r, [3.0, 3.0, 2.0], [3], 1.0, 0.95)[0].tolist() == pytest.approx([0, 0, 0])
    assert [x.size for x in credit.gae([], [], [], 1.0, 1.0)] == [0, 0]
    assert [x.size for x in credit.gae([], [], [0], 1.0, 1.0)] == [0, 0]
    with pytest.raises(ValueError, match="shape"):
        credit.gae([1.0], [1.0, 2.0], [1], 1.0, 1.0)
    with pytest.raises(ValueError, match="the rows have 3 tokens, there are values for 2"):
        credit.gae([1.0, 2.0], [1.0, 2.0], [1, 2], 1.0, 1.0)


def test_rows_end_to_end_have_the_bits_of_each_row_alone() -> None:
    """Credit is computed for the whole iteration at once, without an effect between rows."""
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(0, 40, 60).tolist(), 0, 300, 1, 0]
    cuts = np.cumsum(lengths)[:-1]
    values = rng.normal(size=sum(lengths)) * 10
    rewards = rng.normal(size=sum(lengths))
    scores = rng.normal(size=len(lengths))
    rows = np.split(rewards, cuts)

    def backward(row: np.ndarray, discount: float) -> list[float]:
        out: list[float] = []
        running = 0.0
        for value in row.tolist()[::-1]:
            running = value + discount * running
            out.append(running)
        return out[::-1]

    def one_gae(reward: np.ndarray, value: np.ndarray) -> list[float]:
        after = np.append(value[1:], 0.0)[: value.size]
        return backward(reward + 0.99 * after - value, 0.99 * 0.9)

    sums = credit.discounted_sums(rewards, lengths, 0.97)
    assert sums.tolist() == [x for row in rows for x in backward(row, 0.97)]
    advantage, returns = credit.gae(rewards, values, lengths, 0.99, 0.9)
    parts = zip(rows, np.split(values, cuts), strict=True)
    assert advantage.tolist() == [x for reward, value in parts for x in one_gae(reward, value)]
    assert returns.tolist() == (advantage + values).tolist()
    assert credit.row_sums(rewards, lengths).tolist() == [float(row.sum()) for row in rows]
    with_scores = np.split(credit.token_rewards(rewards, 0.1, scores, lengths), cuts)
    for row, alone, score in zip(with_scores, rows, scores.tolist(), strict=True):
        expected = -0.1 * alone
        expected[-1:] += score
        assert row.tolist() == expected.tolist()


@pytest.mark.parametrize("size", [2, 3, 8, 17, 64])
def test_groups_together_have_the_bits_of_each_group_alone(size: int) -> None:
    scores = np.random.default_rng(size).normal(size=(50, size))
    scores[7] = 1e9 + 0.3
    for advantage in (credit.grpo, credit.rloo):
        alone = [advantage(scores[i : i + 1])[0].tolist() for i in range(50)]
        assert advantage(scores).tolist() == alone
    mean, std = scores[0].mean(), scores[0].std(ddof=1)
    assert credit.grpo(scores)[0].tolist() == ((scores[0] - mean) / (std + 1e-6)).tolist()


def test_kl_penalty_estimators() -> None:
    logp, ref = [-1.0, -2.0], [-1.5, -0.5]
    assert credit.kl_penalty(logp, ref, "k1").tolist() == [0.5, -1.5]
    assert credit.kl_penalty(logp, ref, "k2").tolist() == [0.125, 1.125]
    k3 = [math.exp(-0.5) - 1 + 0.5, math.exp(1.5) - 1 - 1.5]
    assert credit.kl_penalty(logp, ref, "k3").tolist() == pytest.approx(k3)
    for estimator in ("k1", "k2", "k3"):
        assert np.isfinite(credit.kl_penalty([-500.0, 0.0], [0.0, -500.0], estimator)).all()  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="k1"):
        credit.kl_penalty(logp, ref, "k4")  # type: ignore[arg-type]


def test_token_rewards_put_the_score_on_the_last_token() -> None:
    kl = np.array([0.5, -1.0, 2.0])
    assert credit.token_rewards(kl, 0.1, [3.0], [3]).tolist() == pytest.approx([-0.05, 0.1, 2.8])
    assert kl.tolist() == [0.5, -1.0, 2.0]
    assert credit.token_rewards([], 0.1, [3.0], [0]).size == 0
    assert credit.token_rewards([4.0], 0.0, [3.0], [1]).tolist() == [3.0]
    assert credit.token_rewards(kl, 0.0, [1.0, 9.0, 2.0], [1, 0, 2]).tolist() == [1.0, 0.0, 2.0]


def test_length_penalties() -> None:
    assert credit.missing_eos_penalty(truncated=True, penalty=2.0) == 2.0
    assert credit.missing_eos_penalty(truncated=False, penalty=2.0) == 0.0
    lengths = (0, 80, 90, 100, 120)
    soft = [credit.overlong_penalty(n, max_tokens=100, buffer=20, penalty=0.5) for n in lengths]
    assert soft == pytest.approx([0.0, 0.0, 0.25, 0.5, 0.5])
    assert credit.overlong_penalty(100, max_tokens=100, buffer=0, penalty=0.5) == 0.0
    with pytest.raises(ConfigError, match="overlong_buffer"):
        credit.overlong_penalty(1, max_tokens=10, buffer=11, penalty=1.0)


def test_group_advantages_examples() -> None:
    scores = [1.0, 0.0, 0.0, 3.0]
    std = math.sqrt((0 + 1 + 1 + 4) / 3)
    normalized = credit.grpo([scores], eps=0.0)[0].tolist()
    assert normalized == pytest.approx([0, -1 / std, -1 / std, 2 / std])
    assert credit.rloo([scores])[0].tolist() == pytest.approx(
        [1 - 3 / 3, 0 - 4 / 3, 0 - 4 / 3, 3 - 1 / 3]
    )


@given(scores=SCORES, shift=SCORE, data=st.data())
@settings(max_examples=60, deadline=None)
def test_group_advantages_ignore_order_and_a_constant(
    scores: list[float], shift: float, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(scores))))
    for advantage in (lambda s: credit.grpo([s], eps=1e-2)[0], lambda s: credit.rloo([s])[0]):
        plain = advantage(scores)
        assert advantage([scores[i] for i in order]).tolist() == pytest.approx(
            plain[list(order)].tolist(), abs=1e-8
        )
        assert advantage([s + shift for s in scores]).tolist() == pytest.approx(
            plain.tolist(), abs=1e-7
        )
        assert float(plain.sum()) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("advantage", [credit.grpo, credit.rloo])
def test_ties_and_single_samples_have_no_advantage(advantage) -> None:  # type: ignore[no-untyped-def]
    assert advantage([[]]).tolist() == [[]]
    assert advantage([[7.0]]).tolist() == [[0.0]]
    assert advantage([[1e6 + 0.1] * 3])[0].tolist() == pytest.approx([0.0] * 3, abs=1e-9)
    # The mean of equal numbers is off by a rounding error, which a division by the standard
    # deviation would amplify.
    assert credit.grpo([[1e9 + 0.3] * 3]).tolist() == [[0.0] * 3]


def test_reinforce_plus_plus_is_whitened_reward_to_go() -> None:
    kls, scores, coef = [[0.5, 0.1, -0.2], [], [1.0]], [2.0, 9.0, -1.0], 0.3
    lengths = [3, 0, 1]
    rewards = credit.token_rewards([x for kl in kls for x in kl], coef, scores, lengths)
    to_go = [[2.0 - coef * sum(kls[0][t:]) for t in range(3)], [], [-1.0 - coef * 1.0]]
    flat = [x for row in to_go for x in row]
    mean = sum(flat) / 4
    std = math.sqrt(sum((x - mean) ** 2 for x in flat) / 4)
    got = credit.reinforce_plus_plus(rewards, lengths)
    assert got.tolist() == pytest.approx([(x - mean) / std for x in flat], rel=1e-6)
    assert credit.discounted_sums([1.0, 1.0, 1.0], [3], 0.5).tolist() == [1.75, 1.5, 1.0]


def test_whitening_is_over_all_tokens_of_the_iteration() -> None:
    tokens = [1.0, 2.0, 6.0]
    white = credit.whiten(tokens)
    assert float(white.mean()) == pytest.approx(0, abs=1e-9) and float(
        white.std()
    ) == pytest.approx(1)
    kept = credit.whiten(tokens, keep_mean=True)
    assert float(kept.mean()) == pytest.approx(3.0) and float(kept.std()) == pytest.approx(1)
    assert credit.whiten([5.0, 5.0, 5.0]).tolist() == [0.0, 0.0, 0.0]
    assert credit.whiten([]).tolist() == []


def test_adaptive_kl() -> None:
    controller = AdaptiveKL(coef=0.1, target=6.0, horizon=1000)
    assert controller.update(6.0, 100) == 0.1
    assert controller.update(6.6, 100) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    before = controller.coef
    assert controller.update(600.0, 100) == pytest.approx(before * 1.02)
    before = controller.coef
    assert controller.update(-5.0, 10**9) == pytest.approx(before * 0.8)
    other = AdaptiveKL(coef=1.0, target=6.0, horizon=1000)
    other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert other.coef == controller.coef
    with pytest.raises(ValueError, match="kl_per_response"):
        controller.update(math.nan, 1)
    for name in ("coef", "target", "horizon"):
        with pytest.raises(ConfigError, match=name):
            AdaptiveKL(**{"coef": 0.1, "target": 6.0, "horizon": 10.0, name: 0.0})


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_best_worst() -> None:
    chosen = pairing.best_worst([0.1, 0.9, 0.4, 0.0])
    assert (
        chosen.pairs == (pairing.ScoredPair(chosen=1, rejected=3, margin=0.9),) and chosen.ties == 0
    )
    assert pairing.best_worst([0.1, 0.9], min_margin=0.8) == pairing.PairSelection(pairs=(), ties=1)
    assert pairing.best_worst([1.0, 1.0, 0.0, 0.0]).pairs[0] == pairing.ScoredPair(
        chosen=0, rejected=3, margin=1.0
    )


def test_all_pairs() -> None:
    selected = pairing.all_pairs([2.0, 0.0, 2.0, 1.0])
    got = [(pair.chosen, pair.rejected, pair.margin) for pair in selected.pairs]
    assert got == [(0, 3, 1.0), (0, 1, 2.0), (2, 3, 1.0), (2, 1, 2.0), (3, 1, 1.0)]
    assert selected.ties == 1
    assert pairing.all_pairs([2.0, 0.0, 2.0, 1.0], min_margin=1.0).ties == 4


def test_best_random_draws_only_worse_samples() -> None:
    scores = [0.0, 5.0, 4.9, 1.0, 5.0]
    draws = [pairing.best_random(scores, rng(seed), min_margin=0.5) for seed in range(60)]
    assert {(d.pairs[0].chosen, d.pairs[0].rejected) for d in draws} == {(1, 0), (1, 3)}
    assert draws[0] == pairing.best_random(scores, rng(0), min_margin=0.5)


@given(scores=SCORES, margin=st.floats(0, 10), seed=st.integers(0, 10))
@settings(max_examples=80, deadline=None)
def test_pairs_exceed_the_margin_and_drops_are_counted(
    scores: list[float], margin: float, seed: int
) -> None:
    count = len(scores)
    everything = pairing.all_pairs(scores, margin)
    assert len(everything.pairs) + everything.ties == count * (count - 1) // 2
    for one in (pairing.best_worst(scores, margin), pairing.best_random(scores, rng(seed), margin)):
        assert len(one.pairs) + one.ties == (1 if count >= 2 else 0)
        assert set(one.pairs) <= set(everything.pairs)
        assert bool(one.pairs) == (count >= 2 and max(scores) - min(scores) > margin)
    for pair in everything.pairs:
        assert pair.margin == scores[pair.chosen] - scores[pair.rejected] > margin


@given(scores=SCORES, data=st.data())
@settings(max_examples=40, deadline=None)
def test_pair_margins_ignore_order(scores: list[float], data: st.DataObject) -> None:
    shuffled = [scores[i] for i in data.draw(st.permutations(range(len(scores))))]
    for select in (pairing.best_worst, pairing.all_pairs):
        assert sorted(p.margin for p in select(scores).pairs) == sorted(
            p.margin for p in select(shuffled).pairs
        )


def test_identical_completions_are_ties() -> None:
    scores, answers = [1.0, 0.0, 0.5], [(1, 2), (1, 2), (3,)]
    assert pairing.best_worst(scores, completions=answers) == pairing.PairSelection(
        pairs=(), ties=1
    )
    got = [
        (pair.chosen, pair.rejected)
        for pair in pairing.all_pairs(scores, completions=answers).pairs
    ]
    assert got == [(0, 2), (2, 1)] and pairing.all_pairs(scores, completions=answers).ties == 1
    assert {
        pairing.best_random(scores, rng(s), completions=answers).pairs[0].rejected
        for s in range(20)
    } == {2}
    with pytest.raises(ValueError, match="2 completions for 3 scores"):
        pairing.best_worst(scores, completions=[1, 2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_is_refused(bad: float) -> None:
    scores = [0.0, bad, 1.0]
    calls = (
        lambda: credit.grpo([scores]),
        lambda: credit.rloo([scores]),
        lambda: pairing.best_worst(scores),
        lambda: pairing.all_pairs(scores),
        lambda: pairing.best_random(scores, rng()),
        lambda: credit.gae(scores, [0.0] * 3, [3], 1.0, 1.0),
        lambda: credit.gae([0.0] * 3, scores, [3], 1.0, 1.0),
        lambda: credit.whiten([1.0, *scores]),
        lambda: credit.reinforce_plus_plus(scores, [3]),
        lambda: credit.token_rewards(scores, 0.1, [1.0], [3]),
        lambda: credit.token_rewards([0.0], 0.1, [bad], [1]),
        lambda: credit.kl_penalty(scores, [0.0] * 3, "k1"),
    )
    for call in calls:
        with pytest.raises(ValueError):
            call()
    with pytest.raises(ConfigError):
        pairing.best_worst([0.0, 1.0], min_margin=bad)

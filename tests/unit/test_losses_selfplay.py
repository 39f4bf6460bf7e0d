"""SPPO, INPO and HyPO losses against float64 values computed from the papers' equations, and
against sharding."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rayhf.algorithms.inpo import INPOConfig
from rayhf.learner.micro_batch import build_micro_batch
from rayhf.losses.base import Totals
from rayhf.losses.hypo import HyPOLoss, HyPOLossConfig, leave_one_out
from rayhf.losses.selfplay import INPOLoss, SPPOLoss, inpo, sppo
from rayhf.types import Example, Row, token_array


def row(logp, *, ref=None, old=None, behavior=None, target=0.0):
    n = len(logp)
    tokens = {"behavior_logp": logp if behavior is None else behavior}
    tokens |= {"ref_logp": ref} if ref is not None else {}
    tokens |= {"old_logp": old} if old is not None else {}
    return Row(
        prompt_id="p",
        sample=0,
        prompt_ids=token_array((1,)),
        response_ids=token_array(range(2, 2 + n)),
        tokens={name: np.asarray(v, dtype=np.float32) for name, v in tokens.items()},
        scalars={"target": target},
    )


def totals_of(examples):
    rows = [r for e in examples for r in e.rows]
    sums = {}
    for e in examples:
        for name, value in e.scalars.items():
            sums[name] = sums.get(name, 0.0) + value
    return Totals(
        tokens=float(sum(len(r.response_ids) for r in rows)),
        rows=float(len(rows)),
        examples=float(len(examples)),
        scalars=sums,
    )


def run(loss, examples, logps, *, totals=None):
    """Loss and gradient per row, on one micro-batch."""
    micro = build_micro_batch(examples, totals or totals_of(examples), "cpu")
    output = torch.tensor(np.concatenate(logps), dtype=torch.float32, requires_grad=True)
    result = loss(output, micro)
    result.loss.backward()
    sizes = [len(v) for v in logps]
    return result, [g[0].item() if len(g) else 0.0 for g in output.grad.split(sizes)]


def test_sppo_with_a_pull_has_the_mirror_descent_step_as_its_minimizer():
    eta, pull, old, ref, target = 3.0, 0.25, -1.2, -4.0, 0.3
    step = old + eta * target - pull * (old - ref)
    loss = SPPOLoss(eta=eta, pull=pull)
    examples = [Example(rows=(row([step], ref=[ref], old=[old], target=target),))]
    result, gradients = run(loss, examples, [[step]])
    assert gradients == pytest.approx([0.0], abs=1e-6)
    assert result.loss.item() == pytest.approx(0.0, abs=1e-6)
    _, gradients = run(loss, examples, [[step + 0.5]])
    assert gradients == pytest.approx([0.5 / eta * 1.0], rel=1e-5)


def last_policies(odds, *, eta, pull, steps=200, samples=64):
    """Play SPPO's exact steps on sampled win rates from uniform play; the last 20 policies."""
    rng = np.random.default_rng(1)
    start = np.full(3, 1 / 3)
    policy = start.copy()
    policies = []
    for _ in range(steps):
        share = np.bincount(rng.choice(3, size=samples, p=policy), minlength=3) / samples
        logp = np.log(policy + 1e-300)
        step = eta * (odds @ share - 0.5) - pull * (logp - np.log(start))
        logp = np.where(share > 0, logp + step, logp)  # only sampled moves are trained
        policy = np.exp(logp - logp.max())
        policy /= policy.sum()
        policies.append(policy)
    return policies[-20:]


def test_a_pull_keeps_every_move_alive_on_games_of_random_odds():
    """Without it a move dies out, and the others' order then decides alone."""
    rng = np.random.default_rng(7)
    for _ in range(10):
        a, b, c = rng.uniform(0.6, 0.9, size=3)
        odds = np.array([[0.5, a, 1 - b], [1 - a, 0.5, c], [b, 1 - c, 0.5]])
        pulled = last_policies(odds, eta=2.0, pull=0.1)
        plain = last_policies(odds, eta=2.0, pull=0.0)
        exploitability = [2 * ((odds @ p).max() - 0.5) for p in pulled]
        assert np.mean(exploitability) < 0.2
        assert min(p.min() for p in pulled) > 0.05 > min(p.min() for p in plain)


def test_sppo_equals_the_papers_regression_up_to_scale():
    eta, ratio, target = 1000.0, 3.25, 0.2
    paper = (ratio - eta * target) ** 2
    got = sppo(
        torch.tensor([ratio], dtype=torch.float64), torch.tensor([target], dtype=torch.float64), eta
    ).item()
    assert got * 2 * eta == pytest.approx(paper, rel=1e-12)
    logps, refs, targets = [[-1.0, -2.0], [-0.5]], [[-1.5, -2.0], [-0.25]], [0.3, -0.1]
    examples = [
        Example(rows=(row(lp, ref=rp, target=t),))
        for lp, rp, t in zip(logps, refs, targets, strict=True)
    ]
    result, gradients = run(SPPOLoss(eta=2.0), examples, logps)
    ratios = [sum(lp) - sum(rp) for lp, rp in zip(logps, refs, strict=True)]
    expected = sum((d - 2.0 * t) ** 2 / 4.0 for d, t in zip(ratios, targets, strict=True)) / 2
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)
    # d loss / d logp = (d / eta - target) / rows: of order 1 whatever eta is
    assert gradients == pytest.approx(
        [(d / 2.0 - t) / 2 for d, t in zip(ratios, targets, strict=True)], rel=1e-5
    )


def test_sppo_step_raises_winners_and_lowers_losers():
    examples = [Example(rows=(row([-1.0], ref=[-1.0], target=t),)) for t in (0.3, -0.3, 0.0)]
    _, gradients = run(SPPOLoss(eta=1000.0), examples, [[-1.0]] * 3)
    assert gradients[0] < 0 < gradients[1] and gradients[2] == 0.0


def test_inpo_equals_the_papers_regression_up_to_scale():
    eta, tau = 0.0075, 0.0025
    gap, ref, old = 1.7, 0.4, 0.9
    h = gap - tau / eta * ref - (eta - tau) / eta * old
    values = [torch.tensor([v], dtype=torch.float64) for v in (gap, ref, old)]
    assert inpo(*values, eta, tau).item() / eta == pytest.approx(
        (h - 1 / (2 * eta)) ** 2, rel=1e-12
    )
    rows = (
        row([-1.0, -1.0], ref=[-1.0, -1.2], old=[-1.1, -1.0]),
        row([-3.0], ref=[-2.0], old=[-2.5]),
    )
    result, gradients = run(
        INPOLoss(eta=0.5, tau=0.1), [Example(rows=rows)], [[-1.0, -1.0], [-3.0]]
    )
    h = (-2.0 + 3.0) - 0.2 * (-2.2 + 2.0) - 0.8 * (-2.1 + 2.5)
    assert result.loss.item() == pytest.approx((0.5 * h - 0.5) ** 2 / 0.5, rel=1e-5)
    assert gradients == pytest.approx([2 * (0.5 * h - 0.5), -2 * (0.5 * h - 0.5)], rel=1e-5)
    with pytest.raises(ValidationError, match="tau"):
        INPOConfig(eta=0.1, tau=0.2)


def hypo_examples(pairs, groups):
    given = [
        Example(
            rows=tuple(row(lp, ref=rp, behavior=[math.nan] * len(lp)) for lp, rp in pair),
            scalars={"pair": 1.0, "online": 0.0},
        )
        for pair in pairs
    ]
    fresh = [
        Example(
            rows=tuple(row(lp, ref=rp) for lp, rp in group),
            scalars={"pair": 0.0, "online": float(len(group))},
        )
        for group in groups
    ]
    return given + fresh, [lp for part in (*pairs, *groups) for lp, _ in part]


PAIRS = [(([-1.0, -1.0], [-1.5, -1.2]), ([-2.0], [-1.0]))]
GROUPS = [(([-0.5], [-1.0]), ([-1.0, -2.0], [-1.0, -1.0]), ([-4.0], [-1.0]))]


def test_hypo_is_offline_dpo_plus_online_leave_one_out_kl():
    beta, coef = 0.5, 0.3
    examples, logps = hypo_examples(PAIRS, GROUPS)
    result, gradients = run(
        HyPOLoss(HyPOLossConfig(beta=beta, kl_coef=coef, clip=2.0)), examples, logps
    )
    margin = (-2.0 + 2.7) - (-2.0 + 1.0)
    slope = -beta / (1 + math.exp(beta * margin))
    costs = np.clip([0.5, -1.0, -3.0], -2.0, 2.0)
    advantages = [c - np.mean(np.delete(costs, i)) for i, c in enumerate(costs)]
    expected = [slope, -slope] + [coef * a / 3 for a in advantages]
    assert gradients == pytest.approx(expected, rel=1e-5)
    assert result.metrics["hypo/online_kl"].item() == pytest.approx(
        np.mean([0.5, -1.0, -3.0]), rel=1e-6
    )
    assert result.metrics["reference/kl"].item() == result.metrics["hypo/online_kl"].item()
    assert result.metrics["hypo/dpo_loss"].item() == pytest.approx(
        math.log1p(math.exp(-beta * margin)), rel=1e-6
    )


def test_hypo_with_coefficient_zero_is_offline_dpo():
    examples, logps = hypo_examples(PAIRS, GROUPS)
    _, with_samples = run(
        HyPOLoss(HyPOLossConfig(beta=0.1, kl_coef=0.0, clip=9.0)), examples, logps
    )
    alone, alone_logps = hypo_examples(PAIRS, [])
    _, without = run(HyPOLoss(HyPOLossConfig(beta=0.1, kl_coef=0.0, clip=9.0)), alone, alone_logps)
    assert with_samples[:2] == pytest.approx(without, rel=1e-6) and with_samples[2:] == [
        0.0,
        0.0,
        0.0,
    ]


def test_hypo_step_adds_up_over_micro_batches():
    examples, logps = hypo_examples(PAIRS * 2, GROUPS * 2)
    loss, totals = HyPOLoss(HyPOLossConfig(beta=0.2, kl_coef=0.5, clip=9.0)), totals_of(examples)
    whole, _ = run(loss, examples, logps)
    shares, start = [], 0
    for example in examples:
        part = logps[start : start + len(example.rows)]
        start += len(example.rows)
        shares.append(run(loss, [example], part, totals=totals)[0].loss.item())
    assert sum(shares) == pytest.approx(whole.loss.item(), rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=6), st.randoms())
def test_leave_one_out_ignores_order_and_sums_to_zero(costs, random):
    order = list(range(len(costs)))
    random.shuffle(order)

    def loo(values):
        tensor = torch.tensor(values, dtype=torch.float64)
        return leave_one_out(
            tensor,
            torch.zeros(len(values), dtype=torch.int64),
            torch.tensor([float(len(values))], dtype=torch.float64),
        )

    plain, shuffled = loo(costs), loo([costs[i] for i in order])
    assert torch.allclose(plain[order], shuffled)
    if len(costs) > 1:
        assert abs(plain.sum().item()) < 1e-9
    else:
        assert plain.item() == costs[0]


def test_kl_estimator_is_unbiased():
    """Exact expectation over all pairs of samples of a three-way policy equals the gradient of KL(p
    || ref)."""
    logits = torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    p = logits.log_softmax(0)
    (p.exp() * (p - ref)).sum().backward()
    exact, estimate = logits.grad.clone(), torch.zeros(3, dtype=torch.float64)
    cost = (p - ref).detach()
    for i in range(3):
        for j in range(3):
            logits.grad = None
            advantage = leave_one_out(
                cost[[i, j]], torch.tensor([0, 0]), torch.tensor([2.0], dtype=torch.float64)
            )
            (advantage * logits.log_softmax(0)[[i, j]]).mean().backward()
            estimate += p[i].exp().item() * p[j].exp().item() * logits.grad
    assert torch.allclose(estimate, exact, atol=1e-12)

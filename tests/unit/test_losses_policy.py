"""The policy-gradient and critic losses against the papers' equations in plain float64 Python, and
their invariances.
"""

from __future__ import annotations

import itertools
import math
import pickle
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from rayhf.algorithms.policy_gradient_config import KLConfig
from rayhf.algorithms.ppo import PPOConfig
from rayhf.config.algorithms import ImportanceConfig, PolicyImportanceConfig
from rayhf.errors import ConfigError
from rayhf.losses.base import Loss, MicroBatch, Totals
from rayhf.losses.kl import KLEstimator, KLTerm, kl_estimate, kl_loss
from rayhf.losses.policy import (
    ClippedSurrogate,
    ClippedSurrogateConfig,
    aggregate,
    clipped_surrogate,
)
from rayhf.losses.ratios import safe_exp
from rayhf.losses.value import ValueLoss, explained_variance, value_loss

Rows = Sequence[Mapping[str, Sequence[float]]]
"""One mapping of token fields per row; `out` is the model's output."""

FIELDS = (
    "out",
    "behavior_logp",
    "old_logp",
    "ref_logp",
    "advantage",
    "return",
    "value",
    "entropy",
)


def random_rows(
    seed: int, lengths: Sequence[int], spread: float = 0.4
) -> list[dict[str, list[float]]]:
    rng = random.Random(seed)
    rows = []
    for length in lengths:
        base = [-rng.random() * 3 - 0.01 for _ in range(length)]
        row = {name: [x + rng.gauss(0, spread) for x in base] for name in FIELDS}
        row["advantage"] = [rng.gauss(0, 1.5) for _ in base]
        row["entropy"] = [rng.random() for _ in base]
        rows.append(row)
    return rows


def micro_of(
    rows: Rows, totals: Totals, *, skip: tuple[str, ...] = ()
) -> tuple[Tensor, MicroBatch]:
    """The output tensor (leaf, float64) and the micro-batch holding `rows`, one example each."""
    flat = {
        name: torch.tensor([x for row in rows for x in row[name]], dtype=torch.float64)
        for name in FIELDS
    }
    lengths = [len(row["out"]) for row in rows]
    micro = MicroBatch(
        tokens={name: flat[name] for name in FIELDS if name not in ("out", "entropy", *skip)},
        rows={},
        examples={},
        row_T=torch.tensor(
            [r for r, length in enumerate(lengths) for _ in range(length)], dtype=torch.int64
        ),
        length_R=torch.tensor(lengths, dtype=torch.float32),
        example_R=torch.arange(len(rows)),
        totals=totals,
        entropy_T=None if "entropy" in skip else flat["entropy"],
    )
    return flat["out"].requires_grad_(), micro


def totals_of(rows: Rows) -> Totals:
    return Totals(
        tokens=float(sum(len(row["out"]) for row in rows)),
        rows=float(len(rows)),
        examples=float(len(rows)),
    )


def mean_of(
    rows: Rows, value: Callable[[Mapping[str, Sequence[float]], int], float], how: str
) -> float:
    """The aggregation modes, spelled out over whole rows."""
    per_row = [[value(row, t) for t in range(len(row["out"]))] for row in rows]
    if how == "token_mean":
        return math.fsum(x for row in per_row for x in row) / sum(map(len, per_row))
    if how == "sequence_sum":
        return math.fsum(x for row in per_row for x in row) / len(rows)
    return math.fsum(math.fsum(row) / len(row) for row in per_row if row) / len(rows)


def policy_loss(
    *,
    importance_cap: float | None = 2.0,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator | None = None,
    **settings: Any,
) -> ClippedSurrogate:
    kl = None if kl_estimator is None else KLTerm(coef=kl_coef, estimator=kl_estimator)
    importance = PolicyImportanceConfig(cap=importance_cap)
    return ClippedSurrogate(ClippedSurrogateConfig(**settings), importance, kl)


def expected_policy_loss(rows: Rows, loss: ClippedSurrogate, how: str) -> float:
    """PPO eq. 7 by cases instead of min: where A >= 0 only the upper bound can bind, where A < 0
    only the lower one."""

    def token(row: Mapping[str, Sequence[float]], t: int) -> float:
        ratio = math.exp(row["out"][t] - row["old_logp"][t])
        weight = math.exp(row["old_logp"][t] - row["behavior_logp"][t])
        cap = loss.importance.cap
        weight = 1.0 if cap is None else min(weight, cap)
        advantage = row["advantage"][t]
        if advantage >= 0:
            gain = advantage * min(ratio, 1 + loss.config.clip_high)
        else:
            pushed = max(ratio, 1 - loss.config.clip_low)
            gain = advantage * (
                pushed if loss.config.dual_clip is None else min(pushed, loss.config.dual_clip)
            )
        cost = -weight * gain - loss.config.entropy_coef * row["entropy"][t]
        if loss.kl is not None:
            gap = row["out"][t] - row["ref_logp"][t]
            kl = {"k2": gap * gap / 2, "k3": math.expm1(-gap) + gap}[loss.kl.estimator]
            cost += weight * loss.kl.coef * kl
        return cost

    return mean_of(rows, token, how)


LOSSES: list[ClippedSurrogate] = [
    policy_loss(),
    policy_loss(importance_cap=None, clip_low=0.1, clip_high=0.3),
    policy_loss(importance_cap=1.1, dual_clip=1.5),
    policy_loss(kl_coef=0.3, kl_estimator="k2", entropy_coef=0.2),
    policy_loss(kl_coef=0.3, kl_estimator="k3", dual_clip=2.0),
]


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "sequence_sum"])
@pytest.mark.parametrize("index", range(len(LOSSES)))
def test_policy_loss_equals_the_papers_equation(index: int, how: str) -> None:
    config = LOSSES[index].config.model_copy(update={"aggregate": how})
    loss = replace(LOSSES[index], config=config)
    rows = random_rows(index, [5, 1, 0, 7, 3], spread=0.5)
    out, micro = micro_of(rows, totals_of(rows))
    result = loss(out, micro)
    assert result.loss.item() == pytest.approx(expected_policy_loss(rows, loss, how), rel=1e-6)
    assert result.metrics["learner/loss"].item() == result.loss.item()
    assert not any(metric.requires_grad for metric in result.metrics.values())


@pytest.mark.parametrize("loss", LOSSES)
def test_policy_loss_gradcheck(loss: ClippedSurrogate) -> None:
    rows = random_rows(3, [4, 2, 3])
    out, micro = micro_of(rows, totals_of(rows))
    assert torch.autograd.gradcheck(lambda x: loss(x, micro).loss, (out,))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_equals_its_equation(clip: float | None) -> None:
    rows = random_rows(4, [4, 0, 3])
    out, micro = micro_of(rows, totals_of(rows))

    def token(row: Mapping[str, Sequence[float]], t: int) -> float:
        value, old, target = row["out"][t], row["value"][t], row["return"][t]
        plain = (value - target) ** 2 / 2
        if clip is None:
            return plain
        near = min(max(value, old - clip), old + clip)
        return max(plain, (near - target) ** 2 / 2)

    result = ValueLoss(value_clip=clip)(out, micro)
    assert result.loss.item() == pytest.approx(mean_of(rows, token, "token_mean"), rel=1e-9)
    assert torch.autograd.gradcheck(lambda x: ValueLoss(value_clip=clip)(x, micro).loss, (out,))


def test_value_clipping_takes_the_larger_error() -> None:
    """Moving toward the return by more than the clip gains nothing and has no gradient; moving
    away always costs.
    """
    old, target = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    value = torch.tensor([0.9, -0.9], requires_grad=True)
    per_token = value_loss(value, old, target, 0.2)
    assert per_token.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 1.9**2])
    per_token.sum().backward()
    assert value.grad is not None and value.grad.tolist() == pytest.approx([0.0, -1.9])


def test_explained_variance_from_moments() -> None:
    rows = random_rows(5, [6, 4, 9], spread=1.0)
    out, micro = micro_of(rows, totals_of(rows))
    metrics = {name: x.item() for name, x in ValueLoss()(out, micro).metrics.items()}
    target = [x for row in rows for x in row["return"]]
    error = [y - x for row in rows for x, y in zip(row["out"], row["return"], strict=True)]

    def variance(xs: list[float]) -> float:
        return sum((x - sum(xs) / len(xs)) ** 2 for x in xs) / len(xs)

    assert explained_variance(metrics) == pytest.approx(
        1 - variance(error) / variance(target), rel=1e-9
    )
    constant = {
        "value/return_mean": 3.0,
        "value/return_square": 9.0,
        "value/error_mean": 0.0,
        "value/error_square": 1.0,
    }
    assert explained_variance(constant) == 0.0


ALL: list[Loss] = [
    *LOSSES,
    policy_loss(aggregate="sequence_mean"),
    policy_loss(aggregate="sequence_sum"),
    ValueLoss(),
]


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("skip", [(), ("old_logp",)])
@given(cuts=st.sets(st.integers(1, 5), max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_sharding_does_not_change_the_loss(
    loss: Loss, skip: tuple[str, ...], cuts: set[int], seed: int
) -> None:
    rows = random_rows(seed, [3, 0, 5, 1, 2, 4])
    totals = totals_of(rows)
    out, micro = micro_of(rows, totals, skip=skip)
    whole = loss(out, micro)
    whole.loss.backward()
    edges = [0, *sorted(cuts), len(rows)]
    parts = [micro_of(rows[a:b], totals, skip=skip) for a, b in itertools.pairwise(edges)]
    results = [loss(part_out, part) for part_out, part in parts]
    for result in results:
        result.loss.backward()
    assert sum(r.loss.item() for r in results) == pytest.approx(whole.loss.item(), rel=1e-6)
    grads = [
        part_out.grad if part_out.grad is not None else torch.zeros(0) for part_out, _ in parts
    ]
    assert out.grad is not None
    torch.testing.assert_close(torch.cat(grads), out.grad, rtol=1e-6, atol=1e-9)
    for name, value in whole.metrics.items():
        shares = [r.metrics[name].item() for r in results]
        combined = max(shares) if name.endswith("_max") else sum(shares)
        assert combined == pytest.approx(value.item(), rel=1e-6, abs=1e-12), name


@given(order=st.permutations(range(5)))
@settings(max_examples=10, deadline=None)
def test_order_of_examples_does_not_matter(order: list[int]) -> None:
    rows = random_rows(11, [2, 4, 0, 3, 1])
    loss = policy_loss(kl_coef=0.1, kl_estimator="k2")
    plain = loss(*micro_of(rows, totals_of(rows)))
    shuffled = loss(*micro_of([rows[i] for i in order], totals_of(rows)))
    assert shuffled.loss.item() == pytest.approx(plain.loss.item(), rel=1e-9)


def test_missing_old_logp_is_a_reinforce_step() -> None:
    """Ratio 1, nothing clipped, gradient -w * A / tokens: REINFORCE."""
    rows = random_rows(7, [3, 2])
    out, micro = micro_of(rows, totals_of(rows), skip=("old_logp",))
    result = policy_loss(importance_cap=None)(out, micro)
    result.loss.backward()
    assert out.grad is not None
    torch.testing.assert_close(out.grad, -micro.tokens["advantage"] / 5)
    clipped = {
        "ppo/clip_low",
        "ppo/clip_high",
        "ppo/dual_clip",
        "ppo/old_kl",
        "ppo/importance_capped",
    }
    assert {result.metrics[name].item() for name in clipped} == {0.0}


def test_metrics_have_their_documented_values() -> None:
    rows = random_rows(8, [3, 0, 4])
    out, micro = micro_of(rows, totals_of(rows))
    metrics = policy_loss()(out, micro).metrics
    gaps = [
        b - o for row in rows for b, o in zip(row["behavior_logp"], row["old_logp"], strict=True)
    ]
    kl = sum(o - r for row in rows for o, r in zip(row["out"], row["ref_logp"], strict=True))
    assert metrics["rollout/mismatch_kl"].item() == pytest.approx(sum(gaps) / 7)
    assert metrics["rollout/mismatch_abs_max"].item() == pytest.approx(max(map(abs, gaps)))
    out, micro = micro_of(rows, totals_of(rows), skip=("old_logp",))  # a single step
    now = [b - o for row in rows for b, o in zip(row["behavior_logp"], row["out"], strict=True)]
    only = policy_loss(importance_cap=None)(out, micro).metrics
    assert only["rollout/mismatch_kl"].item() == pytest.approx(sum(now) / 7)
    assert metrics["reference/kl"].item() == pytest.approx(kl / 3)
    assert metrics["policy/entropy"].item() == pytest.approx(
        sum(x for row in rows for x in row["entropy"]) / 7
    )
    bare = policy_loss()(*micro_of(rows, totals_of(rows), skip=("ref_logp", "entropy"))).metrics
    assert "reference/kl" not in bare and "policy/entropy" not in bare


def test_clip_fractions_count_active_bounds_only() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0, 9.0])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    clipped = clipped_surrogate(ratio, advantage, 0.2, 0.2, 3.0)
    assert clipped.clip_high_T.tolist() == [1, 0, 0, 0, 0, 0]
    assert clipped.clip_low_T.tolist() == [0, 0, 0, 1, 0, 0]
    assert clipped.dual_clip_T.tolist() == [0, 0, 0, 0, 0, 1]
    assert clipped.loss_T.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8, -1.0, 3.0])


def test_kl_estimator_values() -> None:
    logp, ref = (
        torch.tensor([-1.0, -2.0], dtype=torch.float64),
        torch.tensor([-1.5, -0.5], dtype=torch.float64),
    )
    assert kl_estimate(logp, ref, "k1").tolist() == pytest.approx([0.5, -1.5])
    assert kl_estimate(logp, ref, "k2").tolist() == pytest.approx([0.125, 1.125])
    assert kl_estimate(logp, ref, "k3").tolist() == pytest.approx(
        [math.exp(-0.5) - 0.5, math.exp(1.5) - 2.5]
    )


@pytest.mark.parametrize(("estimator", "direction"), [("k2", "reverse"), ("k3", "forward")])
def test_kl_losses_have_the_expected_gradient(estimator: str, direction: str) -> None:
    """Enumerate a four-token policy: the expectation of the loss's gradient is the gradient of the
    KL it claims."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-0.5, 0.4, 0.9, -0.2], dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    expected = (logp.exp().detach() * kl_loss(logp, ref, estimator)).sum()  # type: ignore[arg-type]
    (got,) = torch.autograd.grad(expected, logits, retain_graph=True)
    true = (
        (logp.exp() * (logp - ref)).sum()
        if direction == "reverse"
        else (ref.exp() * (ref - logp)).sum()
    )
    torch.testing.assert_close(got, torch.autograd.grad(true, logits, retain_graph=True)[0])
    k1 = (logp.exp().detach() * kl_estimate(logp, ref, "k1")).sum()
    torch.testing.assert_close(
        torch.autograd.grad(k1, logits)[0], torch.zeros(4, dtype=torch.float64)
    )


@pytest.mark.parametrize("shift", [-500.0, 500.0])
@pytest.mark.parametrize("name", ["out", "old_logp", "ref_logp", "behavior_logp"])
def test_extreme_log_ratios_stay_finite_in_float32(shift: float, name: str) -> None:
    rows = random_rows(9, [2, 3])
    for row in rows:
        row[name] = [x + shift for x in row[name]]
    for loss in LOSSES:
        out, micro = micro_of(rows, totals_of(rows))
        result = loss(out.detach().float().requires_grad_(), micro)
        leaf = out.detach().float().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf, micro).loss, leaf)
        assert math.isfinite(result.loss.item()) and bool(grad.isfinite().all())
        assert all(bool(metric.isfinite()) for metric in result.metrics.values())


def test_safe_exp_is_smooth_and_monotonic() -> None:
    x = torch.tensor([19.999, 20.0, 20.001, 500.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(safe_exp(x).sum(), x)
    assert grad.tolist() == pytest.approx([math.exp(19.999), *[math.exp(20)] * 3])
    assert safe_exp(x)[3].item() == pytest.approx(math.exp(20) * 481)
    far = torch.tensor([-500.0], requires_grad=True)
    (pull,) = torch.autograd.grad(kl_loss(far, torch.zeros(1), "k3").sum(), far)
    assert pull.item() < 0  # minimising raises a log-prob that fell far below the reference's


def test_empty_responses_and_micro_batches() -> None:
    rows = random_rows(1, [0, 0])
    for loss in ALL:
        out, micro = micro_of(rows, Totals(tokens=0.0, rows=2.0, examples=2.0))
        result = loss(out, micro)
        result.loss.backward()
        assert result.loss.item() == 0.0
        assert all(metric.item() == 0.0 for metric in result.metrics.values())


def test_refusals() -> None:
    for build in (
        lambda: kl_loss(torch.zeros(1), torch.zeros(1), "k1"),
        lambda: kl_estimate(torch.zeros(1), torch.zeros(1), "k4"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError):
            build()
    for wrong in (
        lambda: policy_loss(dual_clip=1.0),
        lambda: policy_loss(clip_low=0.0),
        lambda: PPOConfig(value_clip=0.0),
        lambda: ImportanceConfig(cap=0.5),
        lambda: KLConfig(where="loss", estimator="k1"),
    ):
        with pytest.raises(ValidationError):
            wrong()
    rows = random_rows(2, [2])
    with pytest.raises(ValueError, match="ref_logp"):
        policy_loss(kl_estimator="k2", kl_coef=0.1)(
            *micro_of(rows, totals_of(rows), skip=("ref_logp",))
        )
    with pytest.raises(ValueError, match="behavior_logp"):
        policy_loss()(*micro_of(rows, totals_of(rows), skip=("behavior_logp",)))
    with pytest.raises(ValueError, match="entropy"):
        policy_loss(entropy_coef=0.1)(*micro_of(rows, totals_of(rows), skip=("entropy",)))
    with pytest.raises(ConfigError, match="token_mean"):
        aggregate(torch.zeros(2), micro_of(rows, totals_of(rows))[1], "mean")  # type: ignore[arg-type]


def test_losses_are_picklable_and_declare_entropy() -> None:
    assert pickle.loads(pickle.dumps(policy_loss(dual_clip=3.0))) == policy_loss(dual_clip=3.0)
    assert pickle.loads(pickle.dumps(ValueLoss())) == ValueLoss()
    assert policy_loss().entropy == "metric" and policy_loss(entropy_coef=0.1).entropy == "loss"
    assert ValueLoss().entropy == "off"

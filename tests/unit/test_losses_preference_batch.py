"""The preference loss over a micro-batch: weights, sharding, metrics, soft labels.

The equations are tested in test_losses_preference.py.
"""

from __future__ import annotations

import itertools
import math
import pickle
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_formulas import EXPECTED, P, prob
from preference_losses import NAMES, REFERENCE_FREE, SMOOTHED, build
from pydantic import ValidationError
from torch import Tensor

from rayhf.config.algorithms import ImportanceConfig
from rayhf.config.registry import LOSSES
from rayhf.losses.base import MicroBatch, Totals
from rayhf.losses.pairs import PairLoss, PairLossConfig, pair_importance_weight

TokenPair = tuple[dict[str, list[float]], dict[str, list[float]]]
FIELDS = ("out", "behavior_logp", "old_logp", "ref_logp", "entropy")


def token_pairs(seed: int, lengths: Sequence[tuple[int, int]]) -> list[TokenPair]:
    rng = random.Random(seed)

    def row(length: int) -> dict[str, list[float]]:
        base = [-rng.random() * 2 - 0.05 for _ in range(length)]
        return {
            name: [x + rng.gauss(0, 0.3) if name != "out" else x for x in base] for name in FIELDS
        }

    return [(row(a), row(b)) for a, b in lengths]


def micro_of(
    pairs: Sequence[TokenPair], examples: float, *, skip: tuple[str, ...] = ()
) -> tuple[Tensor, MicroBatch]:
    rows = [row for pair in pairs for row in pair]
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
        example_R=torch.arange(len(pairs)).repeat_interleave(2),
        totals=Totals(tokens=50.0, rows=2 * examples, examples=examples),
        entropy_T=flat["entropy"],
    )
    return flat["out"].requires_grad_(), micro


def loss_of(name: str, *, importance_cap: float | None = 2.0) -> PairLoss[PairLossConfig]:
    eps = 0.1 if name in SMOOTHED else 0.0
    return build(
        name,
        beta=0.3,
        eps=eps,
        gamma=0.7,
        tau=0.4,
        nll_coef=0.25,
        importance_cap=importance_cap,
    )


LENGTHS = [(3, 2), (1, 4), (5, 5), (2, 1)]


def plain_pair(pair: TokenPair) -> P:
    chosen, rejected = pair
    return P(
        w=math.fsum(chosen["out"]),
        l=math.fsum(rejected["out"]),
        rw=math.fsum(chosen["ref_logp"]),
        rl=math.fsum(rejected["ref_logp"]),
        nw=len(chosen["out"]),
        nl=len(rejected["out"]),
        beta=0.3,
        eps=0.0,
        gamma=0.7,
        tau=0.4,
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cap", [None, 1.05, 2.0])
def test_preference_loss_is_the_weighted_mean_of_pairs(name: str, cap: float | None) -> None:
    pairs = token_pairs(5, LENGTHS)
    loss = loss_of(name, importance_cap=cap)
    total = 0.0
    for pair in pairs:
        p = P(**{**plain_pair(pair).__dict__, "eps": 0.1 if name in SMOOTHED else 0.0})
        tokens = [
            (o, b)
            for row in pair
            for o, b in zip(row["old_logp"], row["behavior_logp"], strict=True)
        ]
        ratio = math.prod(math.exp(o - b) for o, b in tokens) ** (1 / len(tokens))
        weight = 1.0 if cap is None else min(cap, ratio)
        total += weight * (EXPECTED[name](p) + 0.25 * (-p.w / p.nw))
    out, micro = micro_of(pairs, 4.0)
    assert loss(out, micro).loss.item() == pytest.approx(total / 4, rel=1e-6)
    assert torch.autograd.gradcheck(lambda x: loss(x, micro).loss, (out,))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skip", [(), ("old_logp",)])
@given(cuts=st.sets(st.integers(1, 3), max_size=3), order=st.permutations(range(4)))
@settings(max_examples=6, deadline=None)
def test_sharding_and_order_do_not_matter(
    name: str, skip: tuple[str, ...], cuts: set[int], order: list[int]
) -> None:
    pairs = token_pairs(6, [(3, 2), (0, 4), (5, 5), (2, 0)])
    loss = loss_of(name)
    whole = loss(*micro_of(pairs, 4.0, skip=skip))
    shuffled = [pairs[i] for i in order]
    edges = [0, *sorted(cuts), 4]
    parts = [loss(*micro_of(shuffled[a:b], 4.0, skip=skip)) for a, b in itertools.pairwise(edges)]
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-6)
    for key, value in whole.metrics.items():
        shares = [part.metrics[key].item() for part in parts]
        combined = max(shares) if key.endswith("_max") else sum(shares)
        assert combined == pytest.approx(value.item(), rel=1e-6, abs=1e-9), key


def test_metrics_are_means_over_pairs() -> None:
    pairs = token_pairs(7, LENGTHS)
    plain = [plain_pair(pair) for pair in pairs]
    metrics = {
        key: x.item() for key, x in loss_of("sigmoid")(*micro_of(pairs, 4.0)).metrics.items()
    }
    assert metrics["dpo/chosen_reward"] == pytest.approx(sum(0.3 * (p.w - p.rw) for p in plain) / 4)
    assert metrics["dpo/rejected_reward"] == pytest.approx(
        sum(0.3 * (p.l - p.rl) for p in plain) / 4
    )
    assert metrics["dpo/margin"] == pytest.approx(sum(p.u for p in plain) / 4)
    assert metrics["dpo/accuracy"] == pytest.approx(sum(p.u > 0 for p in plain) / 4)
    assert metrics["reference/kl"] == pytest.approx(sum(p.w - p.rw + p.l - p.rl for p in plain) / 8)
    assert {
        "rollout/mismatch_kl",
        "rollout/mismatch_abs_max",
        "policy/entropy",
        "learner/loss",
    } <= metrics.keys()


def test_on_policy_weight_is_exactly_one_and_detached() -> None:
    out, micro = micro_of(token_pairs(8, [(300, 7), (0, 0)]), 2.0)
    weight, capped = pair_importance_weight(out, out.detach().clone(), micro, 2.0)
    assert (
        weight.tolist() == [1.0, 1.0] and capped.tolist() == [0.0, 0.0] and not weight.requires_grad
    )
    weight, capped = pair_importance_weight(out, out.detach() - 500.0, micro, 2.0)
    assert weight.tolist() == [2.0, 1.0] and capped.tolist() == [1.0, 0.0]


def test_identical_completions_have_no_margin() -> None:
    row = token_pairs(9, [(4, 4)])[0][0]
    out, micro = micro_of([(row, row)], 1.0)
    result = build("sigmoid", importance_cap=None)(out, micro)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(math.log(2))
    assert result.metrics["dpo/accuracy"].item() == 0.0
    assert out.grad is not None
    torch.testing.assert_close(out.grad[:4], -out.grad[4:])


@pytest.mark.parametrize("name", NAMES)
def test_empty_responses_are_finite(name: str) -> None:
    out, micro = micro_of(token_pairs(10, [(0, 0), (0, 3), (2, 0)]), 3.0)
    result = loss_of(name)(out, micro)
    result.loss.backward()
    assert (
        out.grad is not None
        and bool(out.grad.isfinite().all())
        and math.isfinite(result.loss.item())
    )


def test_reference_free_losses_run_without_a_reference() -> None:
    pairs = token_pairs(11, LENGTHS)
    for name in NAMES:
        loss = loss_of(name)
        assert loss.needs_reference == (name not in REFERENCE_FREE)
        if loss.needs_reference:
            with pytest.raises(ValueError, match="ref_logp"):
                loss(*micro_of(pairs, 4.0, skip=("ref_logp",)))
        else:
            assert "reference/kl" not in loss(*micro_of(pairs, 4.0, skip=("ref_logp",))).metrics


def test_refusals() -> None:
    for name, wrong in (
        ("exo", {"label_smoothing": 0.0}),
        ("hinge", {"label_smoothing": 0.1}),
        ("robust", {"label_smoothing": 0.5}),
        ("sigmoid", {"beta": 0.0}),
        ("discopop", {"tau": 0.0}),
    ):
        with pytest.raises(ValidationError):
            LOSSES.config_type(name).model_validate(wrong)
    with pytest.raises(ValueError, match="not a known loss"):
        LOSSES.resolve("dpo")
    with pytest.raises(ValidationError):
        ImportanceConfig(cap=0.9)
    out, micro = micro_of(token_pairs(12, [(1, 1), (1, 1)]), 2.0)
    shifted = {name: getattr(micro, name) for name in micro.__dataclass_fields__} | {
        "example_R": torch.tensor([0, 1, 1, 2])
    }
    with pytest.raises(ValueError, match="two by two"):
        build("sigmoid")(out, MicroBatch(**shifted))


def with_examples(micro: MicroBatch, smoothing: Sequence[float]) -> MicroBatch:
    values = {name: getattr(micro, name) for name in micro.__dataclass_fields__}
    return MicroBatch(
        **values | {"examples": {"label_smoothing": torch.tensor(smoothing, dtype=torch.float32)}}
    )


def test_soft_labels_are_one_smoothing_per_pair() -> None:
    pairs, alphas = token_pairs(13, LENGTHS), [0.0, 0.25, 0.5, 0.125]
    expected = 0.0
    slopes = []
    for pair, alpha in zip(pairs, alphas, strict=True):
        p = P(**{**plain_pair(pair).__dict__, "eps": alpha})
        expected += EXPECTED["sigmoid"](p) / 4
        # d loss / d (sum of the chosen's log-probs).
        slopes.append(0.3 * (prob(p.u) - (1 - alpha)) / 4)
    out, micro = micro_of(pairs, 4.0)
    result = build("sigmoid", beta=0.3, importance_cap=None)(out, with_examples(micro, alphas))
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)
    result.loss.backward()
    assert out.grad is not None
    for row, (slope, length) in enumerate(
        zip(twice(slopes), [n for pair in LENGTHS for n in pair], strict=True)
    ):
        got = out.grad[micro.row_T == row]
        assert got.tolist() == pytest.approx([slope if row % 2 == 0 else -slope] * length, rel=1e-6)


def twice(values: Sequence[float]) -> list[float]:
    """Repeat each value for the two rows of its pair."""
    return [value for value in values for _ in range(2)]


def test_equal_soft_labels_are_label_smoothing() -> None:
    out, micro = micro_of(token_pairs(14, LENGTHS), 4.0)
    same = build("sigmoid", eps=0.25)(out, micro).loss
    assert build("sigmoid")(out, with_examples(micro, [0.25] * 4)).loss.item() == pytest.approx(
        same.item(), rel=1e-6
    )


def test_label_of_one_half_pulls_the_margin_to_zero() -> None:
    """With alpha = 1/2 chosen and rejected are interchangeable."""
    chosen, rejected = token_pairs(15, [(3, 2)])[0]
    losses = []
    for pair in ((chosen, rejected), (rejected, chosen)):
        out, micro = micro_of([pair], 1.0)
        losses.append(
            build("sigmoid", importance_cap=None)(out, with_examples(micro, [0.5])).loss.item()
        )
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"sigmoid"}))
def test_other_losses_refuse_soft_labels(name: str) -> None:
    out, micro = micro_of(token_pairs(16, [(1, 1), (1, 1)]), 2.0)
    with pytest.raises(ValueError, match=f"which the loss {name} does not accept"):
        loss_of(name)(out, with_examples(micro, [0.1, 0.2]))


@pytest.mark.parametrize("wrong", [math.nan, -0.1, 0.6])
def test_soft_labels_out_of_range_are_refused(wrong: float) -> None:
    out, micro = micro_of(token_pairs(17, [(1, 1), (1, 1)]), 2.0)
    with pytest.raises(ValueError, match=r"from 0 to 0\.5"):
        build("sigmoid")(out, with_examples(micro, [0.1, wrong]))
    with pytest.raises(ValueError, match=r"the loss has 0\.1"):
        build("sigmoid", eps=0.1)(out, with_examples(micro, [0.1, 0.2]))


def test_picklable() -> None:
    assert pickle.loads(pickle.dumps(loss_of("simpo"))) == loss_of("simpo")
    assert loss_of("simpo").entropy == "metric"

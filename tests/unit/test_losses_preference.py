"""The preference family against the papers' equations in plain float64 Python, and its invariances."""

from __future__ import annotations

import itertools
import math
import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayhf.errors import ConfigError
from rayhf.losses.base import MicroBatch, Totals
from rayhf.losses.preference import (
    PREFERENCE_LOSSES,
    REFERENCE_FREE,
    SMOOTHED,
    Knobs,
    PairLogps,
    PreferenceLoss,
    log_odds,
    pair_importance_weight,
)

NAMES = sorted(PREFERENCE_LOSSES)


@dataclass(frozen=True)
class P:
    """One pair as plain numbers: sums of policy and reference, lengths, and the knobs."""

    w: float
    l: float  # noqa: E741
    rw: float
    rl: float
    nw: int
    nl: int
    beta: float
    eps: float
    gamma: float
    tau: float

    @property
    def u(self) -> float:
        """beta * log of (pi_w / ref_w) / (pi_l / ref_l)."""
        return self.beta * ((self.w - self.l) - (self.rw - self.rl))


def prob(z: float) -> float:
    """P(win) from its odds: e^z / (1 + e^z)."""
    return math.exp(z) / (1.0 + math.exp(z))


def odds_of_mean(total: float, length: int) -> float:
    p = math.exp(total / length)
    return p / (1.0 - p)


def exo_expected(p: P) -> float:
    model, label = (prob(p.u), 1 - prob(p.u)), (1 - p.eps, p.eps)
    return sum(q * math.log(q / y) for q, y in zip(model, label, strict=True))


def nca_expected(p: P) -> float:
    chosen, rejected = prob(p.beta * (p.w - p.rw)), prob(p.beta * (p.l - p.rl))
    return -math.log(chosen * math.sqrt(1 - chosen) * math.sqrt(1 - rejected))


def discopop_expected(p: P) -> float:
    mixture = prob(p.u / p.tau)
    return (1 - mixture) * math.log(1 + math.exp(-p.u)) + mixture * math.exp(-p.u)


def orpo_expected(p: P) -> float:
    ratio = odds_of_mean(p.w, p.nw) / odds_of_mean(p.l, p.nl)
    return -p.w / p.nw - p.beta * math.log(ratio / (1 + ratio))


def sppo_expected(p: P) -> float:
    """The paper's form, eta = 1 / beta, divided by eta^2."""
    eta = 1 / p.beta
    return (((p.w - p.rw) - eta * (1 - 0.5)) ** 2 + ((p.l - p.rl) - eta * (0 - 0.5)) ** 2) / eta**2


EXPECTED: dict[str, Callable[[P], float]] = {
    "sigmoid": lambda p: -(1 - p.eps) * math.log(prob(p.u)) - p.eps * math.log(1 - prob(p.u)),
    "robust": lambda p: ((1 - p.eps) * math.log(1 + math.exp(-p.u)) - p.eps * math.log(1 + math.exp(p.u))) / (1 - 2 * p.eps),
    "hinge": lambda p: 0.0 if p.u > 1 else 1 - p.u,
    "ipo": lambda p: (p.u / p.beta - 0.5 / p.beta) ** 2,
    "exo": exo_expected,
    "nca": nca_expected,
    "apo_zero": lambda p: (1 - prob(p.beta * (p.w - p.rw))) + prob(p.beta * (p.l - p.rl)),
    "apo_down": lambda p: prob(p.beta * (p.w - p.rw)) + (1 - prob(p.u)),
    "sppo_hard": sppo_expected,
    "discopop": discopop_expected,
    "simpo": lambda p: math.log(1 + math.exp(p.gamma - p.beta * (p.w / p.nw - p.l / p.nl))),
    "cpo": lambda p: math.log(1 + math.exp(p.beta * (p.l - p.w))) - p.w / p.nw,
    "orpo": orpo_expected,
}


def random_pairs(seed: int, count: int, name: str) -> list[P]:
    rng = random.Random(seed)
    eps = 0.1 if name in SMOOTHED else 0.0
    pairs = []
    for _ in range(count):
        nw, nl = rng.randint(1, 9), rng.randint(1, 9)
        w, l = -nw * rng.uniform(0.1, 2), -nl * rng.uniform(0.1, 2)  # noqa: E741
        rw, rl = w + rng.gauss(0, 3), l + rng.gauss(0, 3)
        pairs.append(P(w=w, l=l, rw=rw, rl=rl, nw=nw, nl=nl, beta=0.3, eps=eps, gamma=0.7, tau=0.4))
    return pairs


def logps_of(pairs: Sequence[P], dtype: torch.dtype = torch.float64) -> PairLogps:
    def column(name: str) -> Tensor:
        return torch.tensor([getattr(p, name) for p in pairs], dtype=dtype)

    return PairLogps(
        chosen_P=column("w").requires_grad_(),
        rejected_P=column("l").requires_grad_(),
        ref_chosen_P=column("rw"),
        ref_rejected_P=column("rl"),
        chosen_length_P=column("nw"),
        rejected_length_P=column("nl"),
    )


def knobs_of(p: P) -> Knobs:
    return Knobs(beta=p.beta, label_smoothing=p.eps, simpo_gamma=p.gamma, discopop_tau=p.tau)


def test_every_loss_of_the_config_is_here_and_has_an_expectation() -> None:
    from typing import get_args

    from rayhf.config.algorithms import OnlineDPOConfig

    assert set(get_args(OnlineDPOConfig.model_fields["loss"].annotation)) == set(NAMES) == set(EXPECTED)
    assert {"simpo", "cpo", "orpo"} == REFERENCE_FREE


@pytest.mark.parametrize("name", NAMES)
def test_per_pair_loss_is_the_papers_equation(name: str) -> None:
    pairs = random_pairs(1, 40, name)
    got = PREFERENCE_LOSSES[name](logps_of(pairs), knobs_of(pairs[0]))
    assert got.shape == (40,)
    assert got.tolist() == pytest.approx([EXPECTED[name](p) for p in pairs], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_per_pair_loss_gradcheck(name: str) -> None:
    pairs = random_pairs(2, 6, name)
    logps, knobs = logps_of(pairs), knobs_of(pairs[0])

    def call(chosen: Tensor, rejected: Tensor) -> Tensor:
        return PREFERENCE_LOSSES[name](
            PairLogps(
                chosen_P=chosen,
                rejected_P=rejected,
                ref_chosen_P=logps.ref_chosen_P,
                ref_rejected_P=logps.ref_rejected_P,
                chosen_length_P=logps.chosen_length_P,
                rejected_length_P=logps.rejected_length_P,
            ),
            knobs,
        )

    assert torch.autograd.gradcheck(call, (logps.chosen_P, logps.rejected_P))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.05, 3.0])
def test_extreme_log_ratios_have_finite_loss_and_gradient(name: str, dtype: torch.dtype, tau: float) -> None:
    extremes = [-500.0, -30.0, -1e-9, 0.0]
    pairs = [
        P(w=w, l=l, rw=rw, rl=rl, nw=nw, nl=3, beta=beta, eps=0.1 if name in SMOOTHED else 0.0, gamma=1.0, tau=tau)
        for w in extremes
        for l in extremes  # noqa: E741
        for rw, rl in ((0.0, 0.0), (-500.0, 0.0), (0.0, -500.0))
        for nw in (0, 1, 300)
        for beta in (0.1,)
    ]
    logps = logps_of(pairs, dtype)
    for beta in (0.001, 0.1, 1.0):
        knobs = Knobs(beta=beta, label_smoothing=pairs[0].eps, simpo_gamma=1.0, discopop_tau=tau)
        loss = PREFERENCE_LOSSES[name](logps, knobs)
        grads = torch.autograd.grad(loss.sum(), (logps.chosen_P, logps.rejected_P))
        assert bool(loss.isfinite().all()) and all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"apo_down", "exo"}))
def test_gradient_still_prefers_the_chosen_when_far_on_the_wrong_side(name: str) -> None:
    """At u = -50 a stable loss must still push up chosen minus rejected; a clamped exponent would have gone silent.

    apo_zero and exo saturate by definition there (their gradient is exponentially small), apo_down lowers the chosen
    too.
    """
    pairs = [P(w=-40.0, l=-10.0, rw=0, rl=-20.0, nw=4, nl=4, beta=1.0, eps=0.0, gamma=0.0, tau=3.0)]
    logps = logps_of(pairs)
    loss = PREFERENCE_LOSSES[name](logps, knobs_of(pairs[0]))
    up, down = torch.autograd.grad(loss.sum(), (logps.chosen_P, logps.rejected_P))
    assert up.item() < 0 <= down.item() or up.item() < down.item()


def test_identities_between_losses() -> None:
    pairs = random_pairs(3, 20, "simpo")
    logps = logps_of(pairs)
    plain = PREFERENCE_LOSSES["sigmoid"](logps, Knobs(beta=0.3))
    torch.testing.assert_close(PREFERENCE_LOSSES["robust"](logps, Knobs(beta=0.3)), plain)
    # rDPO is unbiased under label flips: (1-e) * loss(pair) + e * loss(flipped pair) = the plain loss.
    flipped = PairLogps(
        chosen_P=logps.rejected_P,
        rejected_P=logps.chosen_P,
        ref_chosen_P=logps.ref_rejected_P,
        ref_rejected_P=logps.ref_chosen_P,
        chosen_length_P=logps.rejected_length_P,
        rejected_length_P=logps.chosen_length_P,
    )
    robust, knobs = PREFERENCE_LOSSES["robust"], Knobs(beta=0.3, label_smoothing=0.2)
    torch.testing.assert_close(0.8 * robust(logps, knobs) + 0.2 * robust(flipped, knobs), plain)
    assert bool((PREFERENCE_LOSSES["exo"](logps, Knobs(beta=0.3, label_smoothing=1e-3)) >= 0).all())


def test_stationary_points_from_the_papers() -> None:
    def gradient(name: str, d_w: float, d_l: float, beta: float) -> list[float]:
        logps = logps_of([P(w=d_w, l=d_l, rw=0, rl=0, nw=1, nl=1, beta=beta, eps=0, gamma=0, tau=0.05)])
        loss = PREFERENCE_LOSSES[name](logps, Knobs(beta=beta))
        grads = torch.autograd.grad(loss.sum(), (logps.chosen_P, logps.rejected_P))
        return [g.item() for g in grads]

    assert gradient("nca", math.log(2) / 0.5, 0.0, 0.5)[0] == pytest.approx(0, abs=1e-12)
    assert gradient("ipo", 5.0, 0.0, 0.1) == pytest.approx([0, 0], abs=1e-9)
    assert gradient("sppo_hard", 500.0, -500.0, 0.001) == pytest.approx([0, 0], abs=1e-12)


@given(q=st.floats(-700, -1e-5))
@settings(max_examples=60, deadline=None)
def test_log_odds_is_stable_over_its_range(q: float) -> None:
    expected = q - (math.log(-math.expm1(q)) if q > -0.1 else math.log1p(-math.exp(q)))
    assert log_odds(torch.tensor([q], dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-9)


# --- the loss class --------------------------------------------------------------------------------------------------

TokenPair = tuple[dict[str, list[float]], dict[str, list[float]]]
FIELDS = ("out", "behaviour_logp", "old_logp", "ref_logp", "entropy")


def token_pairs(seed: int, lengths: Sequence[tuple[int, int]]) -> list[TokenPair]:
    rng = random.Random(seed)

    def row(length: int) -> dict[str, list[float]]:
        base = [-rng.random() * 2 - 0.05 for _ in range(length)]
        return {name: [x + rng.gauss(0, 0.3) if name != "out" else x for x in base] for name in FIELDS}

    return [(row(a), row(b)) for a, b in lengths]


def micro_of(pairs: Sequence[TokenPair], examples: float, *, skip: tuple[str, ...] = ()) -> tuple[Tensor, MicroBatch]:
    rows = [row for pair in pairs for row in pair]
    flat = {name: torch.tensor([x for row in rows for x in row[name]], dtype=torch.float64) for name in FIELDS}
    lengths = [len(row["out"]) for row in rows]
    micro = MicroBatch(
        tokens={name: flat[name] for name in FIELDS if name not in ("out", "entropy", *skip)},
        rows={},
        examples={},
        row_T=torch.tensor([r for r, length in enumerate(lengths) for _ in range(length)], dtype=torch.int64),
        length_R=torch.tensor(lengths, dtype=torch.float32),
        example_R=torch.arange(len(pairs)).repeat_interleave(2),
        totals=Totals(tokens=50.0, rows=2 * examples, examples=examples),
        entropy_T=flat["entropy"],
    )
    return flat["out"].requires_grad_(), micro


def loss_of(name: str, **more: float | None) -> PreferenceLoss:
    eps = 0.1 if name in SMOOTHED else 0.0
    settings_ = {"beta": 0.3, "label_smoothing": eps, "simpo_gamma": 0.7, "discopop_tau": 0.4, "nll_coef": 0.25, **more}
    return PreferenceLoss(loss=name, **settings_)  # type: ignore[arg-type]


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
def test_preference_loss_is_the_weighted_mean_over_pairs(name: str, cap: float | None) -> None:
    pairs = token_pairs(5, LENGTHS)
    loss = loss_of(name, importance_cap=cap)
    total = 0.0
    for pair in pairs:
        p = P(**{**plain_pair(pair).__dict__, "eps": loss.label_smoothing})
        tokens = [(o, b) for row in pair for o, b in zip(row["old_logp"], row["behaviour_logp"], strict=True)]
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
def test_sharding_and_order_do_not_matter(name: str, skip: tuple[str, ...], cuts: set[int], order: list[int]) -> None:
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
    metrics = {key: x.item() for key, x in loss_of("sigmoid")(*micro_of(pairs, 4.0)).metrics.items()}
    assert metrics["dpo/chosen_reward"] == pytest.approx(sum(0.3 * (p.w - p.rw) for p in plain) / 4)
    assert metrics["dpo/rejected_reward"] == pytest.approx(sum(0.3 * (p.l - p.rl) for p in plain) / 4)
    assert metrics["dpo/margin"] == pytest.approx(sum(p.u for p in plain) / 4)
    assert metrics["dpo/accuracy"] == pytest.approx(sum(p.u > 0 for p in plain) / 4)
    assert metrics["reference/kl"] == pytest.approx(sum(p.w - p.rw + p.l - p.rl for p in plain) / 8)
    assert {"rollout/mismatch_kl", "rollout/mismatch_abs_max", "policy/entropy", "learner/loss"} <= metrics.keys()


def test_on_policy_weight_is_exactly_one_and_detached() -> None:
    out, micro = micro_of(token_pairs(8, [(300, 7), (0, 0)]), 2.0)
    weight, capped = pair_importance_weight(out, out.detach().clone(), micro, 2.0)
    assert weight.tolist() == [1.0, 1.0] and capped.tolist() == [0.0, 0.0] and not weight.requires_grad
    weight, capped = pair_importance_weight(out, out.detach() - 500.0, micro, 2.0)
    assert weight.tolist() == [2.0, 1.0] and capped.tolist() == [1.0, 0.0]


def test_identical_answers_have_no_gap_and_cancel() -> None:
    row = token_pairs(9, [(4, 4)])[0][0]
    out, micro = micro_of([(row, row)], 1.0)
    result = PreferenceLoss(importance_cap=None)(out, micro)
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
    assert out.grad is not None and bool(out.grad.isfinite().all()) and math.isfinite(result.loss.item())


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
    for wrong in (
        {"loss": "dpo"},
        {"loss": "exo"},
        {"loss": "hinge", "label_smoothing": 0.1},
        {"loss": "robust", "label_smoothing": 0.5},
        {"beta": 0.0},
        {"discopop_tau": 0.0},
        {"importance_cap": 0.9},
    ):
        with pytest.raises(ConfigError):
            PreferenceLoss(**wrong)  # type: ignore[arg-type]
    out, micro = micro_of(token_pairs(12, [(1, 1), (1, 1)]), 2.0)
    shifted = {name: getattr(micro, name) for name in micro.__dataclass_fields__} | {"example_R": torch.tensor([0, 1, 1, 2])}
    with pytest.raises(ValueError, match="two by two"):
        PreferenceLoss()(out, MicroBatch(**shifted))


def with_examples(micro: MicroBatch, smoothing: Sequence[float]) -> MicroBatch:
    values = {name: getattr(micro, name) for name in micro.__dataclass_fields__}
    return MicroBatch(**values | {"examples": {"label_smoothing": torch.tensor(smoothing, dtype=torch.float32)}})


def test_soft_labels_are_one_smoothing_per_pair() -> None:
    pairs, alphas = token_pairs(13, LENGTHS), [0.0, 0.25, 0.5, 0.125]
    expected = 0.0
    slopes = []
    for pair, alpha in zip(pairs, alphas, strict=True):
        p = P(**{**plain_pair(pair).__dict__, "eps": alpha})
        expected += EXPECTED["sigmoid"](p) / 4
        slopes.append(0.3 * (prob(p.u) - (1 - alpha)) / 4)  # d loss / d (sum of the chosen's log-probs)
    out, micro = micro_of(pairs, 4.0)
    result = PreferenceLoss(beta=0.3, importance_cap=None)(out, with_examples(micro, alphas))
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)
    result.loss.backward()
    assert out.grad is not None
    for row, (slope, length) in enumerate(zip(twice(slopes), [n for pair in LENGTHS for n in pair], strict=True)):
        got = out.grad[micro.row_T == row]
        assert got.tolist() == pytest.approx([slope if row % 2 == 0 else -slope] * length, rel=1e-6)


def twice(values: Sequence[float]) -> list[float]:
    """Each value for the two rows of its pair."""
    return [value for value in values for _ in range(2)]


def test_equal_soft_labels_are_label_smoothing() -> None:
    out, micro = micro_of(token_pairs(14, LENGTHS), 4.0)
    same = PreferenceLoss(label_smoothing=0.25)(out, micro).loss
    assert PreferenceLoss()(out, with_examples(micro, [0.25] * 4)).loss.item() == pytest.approx(same.item(), rel=1e-6)


def test_no_confidence_only_pulls_the_gap_to_zero() -> None:
    """alpha = 1/2: chosen and rejected may change places."""
    chosen, rejected = token_pairs(15, [(3, 2)])[0]
    losses = []
    for pair in ((chosen, rejected), (rejected, chosen)):
        out, micro = micro_of([pair], 1.0)
        losses.append(PreferenceLoss(importance_cap=None)(out, with_examples(micro, [0.5])).loss.item())
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"sigmoid"}))
def test_other_losses_refuse_soft_labels(name: str) -> None:
    out, micro = micro_of(token_pairs(16, [(1, 1), (1, 1)]), 2.0)
    with pytest.raises(ValueError, match=f"the loss is {name}"):
        loss_of(name)(out, with_examples(micro, [0.1, 0.2]))


@pytest.mark.parametrize("wrong", [math.nan, -0.1, 0.6])
def test_soft_labels_out_of_range_are_refused(wrong: float) -> None:
    out, micro = micro_of(token_pairs(17, [(1, 1), (1, 1)]), 2.0)
    with pytest.raises(ValueError, match=r"from 0 to 0\.5"):
        PreferenceLoss()(out, with_examples(micro, [0.1, wrong]))
    with pytest.raises(ValueError, match=r"label_smoothing 0\.1"):
        PreferenceLoss(label_smoothing=0.1)(out, with_examples(micro, [0.1, 0.2]))


def test_picklable() -> None:
    assert pickle.loads(pickle.dumps(loss_of("simpo"))) == loss_of("simpo")
    assert loss_of("simpo").entropy == "metric"

"""The preference family against the papers' equations in plain float64 Python, and its
invariances."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_formulas import EXPECTED, P
from preference_losses import NAMES, REFERENCE_FREE, SMOOTHED, build
from torch import Tensor

from rayhf.config.registry import LOSSES
from rayhf.losses.pairs import PairLogps, PairLoss, PairLossConfig
from rayhf.losses.preference import log_odds


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


def loss_of(name: str, p: P) -> PairLoss[PairLossConfig]:
    return build(name, beta=p.beta, eps=p.eps, gamma=p.gamma, tau=p.tau)


def test_every_loss_has_an_expectation() -> None:
    assert set(NAMES) == set(EXPECTED)
    free = {name for name in NAMES if not LOSSES.resolve(name).needs_reference}
    assert free == REFERENCE_FREE


@pytest.mark.parametrize("name", NAMES)
def test_per_pair_loss_equals_the_papers_equation(name: str) -> None:
    pairs = random_pairs(1, 40, name)
    got = loss_of(name, pairs[0]).per_pair(logps_of(pairs))
    assert got.shape == (40,)
    assert got.tolist() == pytest.approx([EXPECTED[name](p) for p in pairs], rel=1e-9, abs=1e-12)


def test_ipo_of_means_divides_each_log_ratio_by_its_length() -> None:
    pairs = random_pairs(7, 40, "ipo")
    loss = LOSSES.build(LOSSES.config_type("ipo")(beta=0.3, log_ratios="mean"))
    expected = [((p.w - p.rw) / p.nw - (p.l - p.rl) / p.nl - 1 / 0.6) ** 2 for p in pairs]
    assert loss.per_pair(logps_of(pairs)).tolist() == pytest.approx(expected, rel=1e-9)


def test_defaults_of_beta_are_those_of_each_loss() -> None:
    betas = {name: LOSSES.config_type(name)().beta for name in NAMES}
    own = {"simpo": 2.0, "nca": 0.01, "sppo_hard": 0.001}
    assert betas == {name: own.get(name, 0.1) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_per_pair_loss_gradcheck(name: str) -> None:
    pairs = random_pairs(2, 6, name)
    logps = logps_of(pairs)

    def call(chosen: Tensor, rejected: Tensor) -> Tensor:
        return loss_of(name, pairs[0]).per_pair(
            PairLogps(
                chosen_P=chosen,
                rejected_P=rejected,
                ref_chosen_P=logps.ref_chosen_P,
                ref_rejected_P=logps.ref_rejected_P,
                chosen_length_P=logps.chosen_length_P,
                rejected_length_P=logps.rejected_length_P,
            )
        )

    assert torch.autograd.gradcheck(call, (logps.chosen_P, logps.rejected_P))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.05, 3.0])
def test_extreme_log_ratios_have_finite_loss_and_gradient(
    name: str, dtype: torch.dtype, tau: float
) -> None:
    extremes = [-500.0, -30.0, -1e-9, 0.0]
    pairs = [
        P(
            w=w,
            l=l,
            rw=rw,
            rl=rl,
            nw=nw,
            nl=3,
            beta=beta,
            eps=0.1 if name in SMOOTHED else 0.0,
            gamma=1.0,
            tau=tau,
        )
        for w in extremes
        for l in extremes  # noqa: E741
        for rw, rl in ((0.0, 0.0), (-500.0, 0.0), (0.0, -500.0))
        for nw in (0, 1, 300)
        for beta in (0.1,)
    ]
    logps = logps_of(pairs, dtype)
    for beta in (0.001, 0.1, 1.0):
        loss = build(name, beta=beta, eps=pairs[0].eps, gamma=1.0, tau=tau).per_pair(logps)
        grads = torch.autograd.grad(loss.sum(), (logps.chosen_P, logps.rejected_P))
        assert bool(loss.isfinite().all()) and all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"apo_down", "exo"}))
def test_gradient_prefers_chosen_even_far_on_the_wrong_side(name: str) -> None:
    """At u = -50 a stable loss must still push up chosen minus rejected; a clamped exponent would
    have gone silent.

    apo_zero and exo saturate by definition there (their gradient is exponentially small), apo_down
    lowers the chosen too.
    """
    pairs = [P(w=-40.0, l=-10.0, rw=0, rl=-20.0, nw=4, nl=4, beta=1.0, eps=0.0, gamma=0.0, tau=3.0)]
    logps = logps_of(pairs)
    loss = loss_of(name, pairs[0]).per_pair(logps)
    up, down = torch.autograd.grad(loss.sum(), (logps.chosen_P, logps.rejected_P))
    assert up.item() < 0 <= down.item() or up.item() < down.item()


def test_identities_between_losses() -> None:
    pairs = random_pairs(3, 20, "simpo")
    logps = logps_of(pairs)
    plain = build("sigmoid", beta=0.3).per_pair(logps)
    torch.testing.assert_close(build("robust", beta=0.3).per_pair(logps), plain)
    # rDPO is unbiased under label flips: (1-e) * loss(pair) + e * loss(flipped pair) = the plain
    # loss.
    flipped = PairLogps(
        chosen_P=logps.rejected_P,
        rejected_P=logps.chosen_P,
        ref_chosen_P=logps.ref_rejected_P,
        ref_rejected_P=logps.ref_chosen_P,
        chosen_length_P=logps.rejected_length_P,
        rejected_length_P=logps.chosen_length_P,
    )
    robust = build("robust", beta=0.3, eps=0.2).per_pair
    torch.testing.assert_close(0.8 * robust(logps) + 0.2 * robust(flipped), plain)
    assert bool((build("exo", beta=0.3, eps=1e-3).per_pair(logps) >= 0).all())


def test_stationary_points_from_the_papers() -> None:
    def gradient(name: str, d_w: float, d_l: float, beta: float) -> list[float]:
        logps = logps_of(
            [P(w=d_w, l=d_l, rw=0, rl=0, nw=1, nl=1, beta=beta, eps=0, gamma=0, tau=0.05)]
        )
        loss = build(name, beta=beta).per_pair(logps)
        grads = torch.autograd.grad(loss.sum(), (logps.chosen_P, logps.rejected_P))
        return [g.item() for g in grads]

    assert gradient("nca", math.log(2) / 0.5, 0.0, 0.5)[0] == pytest.approx(0, abs=1e-12)
    assert gradient("ipo", 5.0, 0.0, 0.1) == pytest.approx([0, 0], abs=1e-9)
    assert gradient("sppo_hard", 500.0, -500.0, 0.001) == pytest.approx([0, 0], abs=1e-12)


@given(q=st.floats(-700, -1e-5))
@settings(max_examples=60, deadline=None)
def test_log_odds_is_stable_over_its_range(q: float) -> None:
    expected = q - (math.log(-math.expm1(q)) if q > -0.1 else math.log1p(-math.exp(q)))
    assert log_odds(torch.tensor([q], dtype=torch.float64)).item() == pytest.approx(
        expected, rel=1e-9
    )

"""The losses of scorers against their equations in float64 Python, and their invariances."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from rayhf.config.fit import (
    BradleyTerryConfig,
    BradleyTerryMarginConfig,
    BradleyTerryScaledConfig,
    GeneralPreferenceConfig,
    ObjectiveConfig,
    PairwiseConfig,
    RegressionBradleyTerryConfig,
    RegressionConfig,
)
from rayhf.losses.base import Loss, MicroBatch, Totals
from rayhf.losses.reward import general_preference_score, reward_loss

LOSSES: dict[str, Loss] = {
    "bradley_terry": reward_loss(BradleyTerryConfig(centering=0.0)),
    "bradley_terry, centered": reward_loss(BradleyTerryConfig(centering=0.3)),
    "margin": reward_loss(BradleyTerryMarginConfig(centering=0.01)),
    "scaled": reward_loss(BradleyTerryScaledConfig(centering=0.0)),
    "regression": reward_loss(RegressionConfig()),
    "regression, mixed": reward_loss(RegressionBradleyTerryConfig(mix=0.25)),
    "pairwise": reward_loss(PairwiseConfig()),
    "general preference": reward_loss(GeneralPreferenceConfig(temperature=0.7, centering=0.0)),
    "general preference, centered": reward_loss(
        GeneralPreferenceConfig(temperature=0.7, centering=0.2)
    ),
}
NAMES = sorted(LOSSES)


def win(x: float) -> float:
    return math.exp(x) / (1.0 + math.exp(x))


def skew(w: Sequence[float], l: Sequence[float]) -> float:  # noqa: E741
    """w^T R l with the matrix written out: the blocks are [[0, -1], [1, 0]]."""
    size = len(w)
    matrix = np.zeros((size, size))
    for k in range(0, size, 2):
        matrix[k, k + 1], matrix[k + 1, k] = -1.0, 1.0
    return float(np.asarray(w) @ matrix @ np.asarray(l))


def pair_terms(
    name: str,
    w: Sequence[float],
    l: Sequence[float],  # noqa: E741
    m: float,
    a: float,
    b: float,
) -> float:
    """One pair's part of the mean over pairs, from the papers' formulas."""
    if name == "bradley_terry":
        return -math.log(win(w[0] - l[0]))
    if name == "bradley_terry, centered":
        return math.log(1 + math.exp(l[0] - w[0])) + 0.3 * (w[0] + l[0]) ** 2
    if name == "margin":
        return math.log(1 + math.exp(l[0] + m - w[0])) + 0.01 * (w[0] + l[0]) ** 2
    if name == "scaled":
        return m * math.log(1 + math.exp(l[0] - w[0]))
    if name == "regression":
        return ((w[0] - a) ** 2 + (l[0] - b) ** 2) / 2
    if name == "regression, mixed":
        return 0.25 * ((w[0] - a) ** 2 + (l[0] - b) ** 2) / 2 - 0.75 * math.log(win(w[0] - l[0]))
    if name == "pairwise":  # w: log-odds with the chosen first, l: with the rejected first
        return -(math.log(win(w[0])) + math.log(1 - win(l[0]))) / 2
    centre = (
        0.2 * sum((a + b) ** 2 for a, b in zip(w, l, strict=True)) if "centered" in name else 0.0
    )
    return centre - math.log(win(skew(w, l) / 0.7))


class Data:
    def __init__(self, pairs: int, name: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.name, self.pairs = name, pairs
        self.output = rng.normal(size=(2 * pairs, 4 if name.startswith("general") else 1))
        self.margin, self.rating = rng.uniform(0.2, 3, pairs), rng.normal(size=2 * pairs)

    def micro(self, picked: Sequence[int], totals: Totals) -> tuple[Tensor, MicroBatch]:
        rows = [row for p in picked for row in (2 * p, 2 * p + 1)]
        micro = MicroBatch(
            tokens={},
            rows={"rating": torch.tensor(self.rating[rows])},
            examples={"margin": torch.tensor(self.margin[list(picked)])},
            row_T=torch.arange(len(rows)),
            length_R=torch.ones(len(rows)),
            example_R=torch.arange(len(picked)).repeat_interleave(2),
            totals=totals,
        )
        return torch.tensor(self.output[rows], requires_grad=True), micro

    @property
    def totals(self) -> Totals:
        return Totals(tokens=2.0 * self.pairs, rows=2.0 * self.pairs, examples=float(self.pairs))

    def expected(self) -> float:
        terms = []
        for p in range(self.pairs):
            w, l = self.output[2 * p], self.output[2 * p + 1]  # noqa: E741
            terms.append(
                pair_terms(
                    self.name, w, l, self.margin[p], self.rating[2 * p], self.rating[2 * p + 1]
                )
            )
        return sum(terms) / self.pairs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_values(name: str, seed: int) -> None:
    data = Data(5, name, seed)
    result = LOSSES[name](*data.micro(range(5), data.totals))
    assert result.loss.item() == pytest.approx(data.expected(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    data = Data(4, name, 7)
    output_Td, micro = data.micro(range(4), data.totals)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, micro).loss, (output_Td,))


@pytest.mark.parametrize("name", NAMES)
def test_sharding_does_not_change_the_loss(name: str) -> None:
    data = Data(6, name, 3)
    whole = LOSSES[name](*data.micro(range(6), data.totals))
    parts = [LOSSES[name](*data.micro(p, data.totals)) for p in ([0], [1, 2], [3, 4, 5])]
    assert sum(p.loss.item() for p in parts) == pytest.approx(whole.loss.item(), rel=1e-12)
    for metric, value in whole.metrics.items():
        assert sum(p.metrics[metric].item() for p in parts) == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_pairs_does_not_matter(name: str) -> None:
    data = Data(5, name, 4)
    a = LOSSES[name](*data.micro(range(5), data.totals)).loss.item()
    assert LOSSES[name](*data.micro([3, 1, 4, 0, 2], data.totals)).loss.item() == pytest.approx(
        a, rel=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_extreme_outputs_stay_finite(name: str) -> None:
    data = Data(2, name, 0)
    for scale in (500.0, -500.0):
        data.output = np.sign(data.output) * scale
        output_Td, micro = data.micro(range(2), data.totals)
        output_Td = output_Td.detach().float().requires_grad_(True)
        loss = LOSSES[name](output_Td, micro).loss
        loss.backward()  # type: ignore[no-untyped-call]
        assert (
            math.isfinite(loss.item())
            and output_Td.grad is not None
            and output_Td.grad.isfinite().all()
        )


@pytest.mark.parametrize("name", NAMES)
def test_picklable_without_entropy(name: str) -> None:
    assert pickle.loads(pickle.dumps(LOSSES[name])) == LOSSES[name]
    assert LOSSES[name].entropy == "off"


def test_accuracy_counts_a_tie_as_half() -> None:
    data = Data(3, "bradley_terry", 0)
    data.output = np.array([[2.0], [1.0], [0.5], [0.5], [-1.0], [3.0]])
    metrics = LOSSES["bradley_terry"](*data.micro(range(3), data.totals)).metrics
    assert metrics["scorer/accuracy"].item() == pytest.approx((1 + 0.5 + 0) / 3)
    assert metrics["scorer/margin"].item() == pytest.approx((1 + 0 - 4) / 3)


# -------------------------------------------------------------------------------- the pairwise loss


@settings(deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=2))
def test_pairwise_treats_both_orders_alike(logits: list[float]) -> None:
    """Swapping every label equals swapping every pair: the log-odds change sign."""
    data = Data(1, "pairwise", 0)
    data.output = np.array(logits)[:, None]
    a = LOSSES["pairwise"](*data.micro([0], data.totals))
    data.output = -np.array(logits[::-1])[:, None]
    b = LOSSES["pairwise"](*data.micro([0], data.totals))
    assert a.loss.item() == pytest.approx(b.loss.item())
    assert a.metrics["scorer/accuracy"].item() == b.metrics["scorer/accuracy"].item()


def test_pairwise_identical_completions_learn_one_half() -> None:
    """The same text in both orders has one log-odds: the loss is least at 0."""
    logit = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    data = Data(1, "pairwise", 0)
    _, micro = data.micro([0], data.totals)
    LOSSES["pairwise"](logit.expand(2, 1), micro).loss.backward()  # type: ignore[no-untyped-call]
    assert logit.grad is not None and logit.grad.item() == pytest.approx(win(0.7) - 0.5)


# ------------------------------------------------------------------------------- general preference

embedding = st.lists(st.floats(-1e3, 1e3, width=32), min_size=6, max_size=6)


@settings(deadline=None)
@given(embedding, embedding)
def test_general_preference_is_skew_symmetric(first: list[float], second: list[float]) -> None:
    a, b = torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
    assert general_preference_score(a, b).item() == -general_preference_score(b, a).item()
    assert general_preference_score(a, a).item() == 0.0
    assert general_preference_score(a, b).item() == pytest.approx(
        skew(first, second), rel=1e-9, abs=1e-6
    )


def test_general_preference_score_example() -> None:
    a, b = torch.tensor([1.0, 2.0, 0.0, 1.0]), torch.tensor([3.0, 4.0, 5.0, 0.0])
    assert general_preference_score(a, b).item() == 2 * 3 - 1 * 4 + 1 * 5 - 0 * 0


def test_one_block_represents_a_cycle() -> None:
    angles = torch.tensor([0.0, 2.0, 4.0]) * math.pi / 3
    v = torch.stack([angles.cos(), angles.sin()], -1)
    score = general_preference_score(v[:, None], v[None, :])
    assert (score[0, 1] > 0) == (score[1, 2] > 0) == (score[2, 0] > 0)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (BradleyTerryConfig, {"centering": -1.0}),
        (RegressionBradleyTerryConfig, {"mix": 1.5}),
        (GeneralPreferenceConfig, {"centering": -0.1}),
        (GeneralPreferenceConfig, {"temperature": 0.0}),
    ],
)
def test_wrong_settings_are_refused(
    config: type[ObjectiveConfig], settings: dict[str, float]
) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        config.model_validate(settings)


def test_wrong_head_is_refused() -> None:
    data = Data(2, "general preference", 0)
    output_Td, micro = data.micro(range(2), data.totals)
    with pytest.raises(ValueError, match="reads one output per text, the score head has 4"):
        LOSSES["bradley_terry"](output_Td, micro)
    with pytest.raises(ValueError, match="an even number of outputs, the score head has 3"):
        LOSSES["general preference"](output_Td[:, :3], micro)
    with pytest.raises(ValueError, match=r"shape \(4, d\)"):
        LOSSES["pairwise"](output_Td[:3], micro)


def test_missing_value_is_named() -> None:
    data = Data(1, "margin", 0)
    output_Td, micro = data.micro([0], data.totals)
    bare = replace(micro, rows={}, examples={})
    with pytest.raises(ValueError, match="example value 'margin'"):
        LOSSES["margin"](output_Td, bare)
    with pytest.raises(ValueError, match="row value 'rating'"):
        LOSSES["regression"](output_Td, bare)

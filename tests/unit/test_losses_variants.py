"""Losses and importance weights of the policy-gradient variants, against a few lines of numpy."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from rayhf.config.algorithms import PolicyImportanceConfig
from rayhf.config.registry import LOSSES
from rayhf.losses.base import MicroBatch, Totals
from rayhf.losses.kl import KLTerm
from rayhf.losses.ratios import importance_weight

OFF = PolicyImportanceConfig(cap=None)
LENGTHS = (4, 1, 3)


class Rows:
    """Random log-probs of three responses, one advantage per response."""

    def __init__(self, seed=0, spread=0.4):
        rng = np.random.default_rng(seed)
        n = sum(LENGTHS)
        self.logp = -rng.uniform(0.1, 3, n)
        self.old, self.behavior, self.ref = self.logp + rng.normal(0, spread, (3, n))
        self.row = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
        self.advantage = np.array([1.3, -0.7, 0.4])[self.row]
        self.entropy = rng.uniform(0, 1, n)

    def parts(self, values):
        return [values[self.row == r] for r in range(len(LENGTHS))]

    def micro(self, *rows):
        """Return the leaf with log-probs, and the micro-batch of some rows (default: of all)."""
        rows = rows or range(len(LENGTHS))
        keep = np.isin(self.row, rows)
        tokens = {
            "old_logp": self.old,
            "behavior_logp": self.behavior,
            "ref_logp": self.ref,
            "advantage": self.advantage,
        }
        lengths = [LENGTHS[r] for r in rows]
        micro = MicroBatch(
            tokens={name: torch.tensor(values[keep]) for name, values in tokens.items()},
            rows={},
            examples={},
            row_T=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
            length_R=torch.tensor(lengths, dtype=torch.float32),
            example_R=torch.arange(len(lengths)),
            totals=Totals(tokens=float(sum(LENGTHS)), rows=3.0, examples=3.0),
            entropy_T=torch.tensor(self.entropy[keep]),
        )
        return torch.tensor(self.logp[keep], requires_grad=True), micro


def build(type, *, importance=OFF, **more):
    settings = {name: more.pop(name) for name in list(more) if name not in ("kl", "max_tokens")}
    config = LOSSES.config_type(type)(**settings)
    return LOSSES.build(config, importance=importance, **more)


def value_and_gradient(loss, *micro):
    out, batch = micro
    result = loss(out, batch).loss
    result.backward()
    return result.item(), out.grad.numpy()


def numeric_gradient(function, logp, step=1e-6):
    steps = np.eye(len(logp)) * step
    return np.array([(function(logp + d) - function(logp - d)) / (2 * step) for d in steps])


def test_gspo_is_a_mean_of_clipped_sequence_ratios():
    bounds = {"clip_low": 0.005, "clip_high": 0.008}

    def objective(rows, logp):  # Zheng et al. 2025, eq. 5 to 7
        costs = []
        for new, old, a in zip(
            rows.parts(logp), rows.parts(rows.old), rows.parts(rows.advantage), strict=True
        ):
            ratio = math.exp(float(np.mean(new - old)))
            near = min(max(ratio, 1 - bounds["clip_low"]), 1 + bounds["clip_high"])
            costs.append(-min(ratio * a[0], near * a[0]))
        return sum(costs) / len(costs)

    clipped = []
    for seed in range(6):
        rows = Rows(seed, spread=0.02)
        value, gradient = value_and_gradient(build("gspo", **bounds), *rows.micro())
        numeric = numeric_gradient(partial(objective, rows), rows.logp)
        assert value == pytest.approx(objective(rows, rows.logp), rel=1e-9)
        assert gradient == pytest.approx(numeric, abs=1e-8)
        clipped += [not part.any() for part in rows.parts(gradient)]  # whole responses
    assert 0 < sum(clipped) < len(clipped)


def test_gspo_defaults_are_the_papers():
    config = LOSSES.config_type("gspo")()
    assert (config.clip_low, config.clip_high, config.aggregate) == (3e-4, 4e-4, "sequence_mean")


@pytest.mark.parametrize("clip_low", [None, 0.1])
def test_cispo_weighs_log_probs_by_a_clipped_ratio_without_gradient(clip_low):
    rows = Rows()
    loss = build("cispo", clip_high=0.2, clip_low=clip_low)
    ratio = np.exp(rows.logp - rows.old)
    weight = np.clip(ratio, 0 if clip_low is None else 0.9, 1.2)  # MiniMax-M1, eq. 4 and 5
    out, micro = rows.micro()
    metrics = loss(out, micro).metrics
    value, gradient = value_and_gradient(loss, out, micro)
    assert value == pytest.approx(-np.mean(weight * rows.advantage * rows.logp))
    assert gradient == pytest.approx(-weight * rows.advantage / sum(LENGTHS))
    assert metrics["ppo/clip_high"].item() == pytest.approx(np.mean(ratio > 1.2))
    assert (ratio > 1.2).any() and gradient.all()  # no token is dropped


def test_constant_length_divides_every_response_by_the_limit():
    rows = Rows()
    loss = build("clipped", aggregate="constant_length", clip_low=9.0, clip_high=9.0, max_tokens=50)
    ratio = np.exp(rows.logp - rows.old)
    value, gradient = value_and_gradient(loss, *rows.micro())
    assert value == pytest.approx(-np.sum(ratio * rows.advantage) / 50 / 3)  # Dr. GRPO, eq. 3
    assert gradient == pytest.approx(-ratio * rows.advantage / 50 / 3)
    with pytest.raises(ValueError, match="max_tokens"):
        build("clipped", aggregate="constant_length")(*rows.micro())


def test_bonus_and_unbiased_kl_of_every_loss():
    rows = Rows()
    gap, rho = rows.logp - rows.ref, np.exp(rows.logp - rows.old)
    term = KLTerm(coef=0.3, estimator="k3", unbiased=True)
    for name in ("clipped", "gspo", "cispo"):
        plain = build(name, aggregate="token_mean")
        full = build(name, aggregate="token_mean", entropy_coef=0.2, kl=term)
        value, gradient = value_and_gradient(plain, *rows.micro())
        other, with_kl = value_and_gradient(full, *rows.micro())
        kl = np.mean(rho * (np.exp(-gap) - 1 + gap))
        assert other == pytest.approx(value + 0.3 * kl - 0.2 * rows.entropy.mean())
        assert with_kl - gradient == pytest.approx(0.3 * rho * gap / sum(LENGTHS))


@pytest.mark.parametrize("name", ["gspo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_sharding_does_not_change_a_variant(name, level):
    rows = Rows()
    loss = build(name, importance=PolicyImportanceConfig(level=level, kind="mask", cap=1.5))
    value, gradient = value_and_gradient(loss, *rows.micro())
    shares = [value_and_gradient(loss, *rows.micro(*part)) for part in ((0,), (1, 2))]
    assert sum(share for share, _ in shares) == pytest.approx(value)
    assert np.concatenate([part for _, part in shares]) == pytest.approx(gradient)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_importance_weights_equal_their_definition(kind, level):
    rows = Rows(seed=3)
    rows.behavior = rows.old - np.array([0.5, -0.5, 0.02])[rows.row]
    gap = rows.old - rows.behavior
    of_row = {"sequence": np.sum, "geometric": np.mean}
    if level != "token":
        gap = np.array([of_row[level](part) for part in rows.parts(gap)])[rows.row]
    ratio = np.exp(gap)
    config = PolicyImportanceConfig(kind=kind, level=level, cap=1.2, floor=None)
    if kind == "truncate":
        expected, outside = np.minimum(ratio, 1.2), ratio > 1.2
    else:
        outside = (ratio > 1.2) | (ratio < 1 / 1.2)
        expected = np.where(outside, 0, ratio)
    out, micro = rows.micro()
    old = micro.tokens["old_logp"]
    weights = importance_weight(old, micro.tokens["behavior_logp"], micro, config)
    assert weights.weight_T.numpy() == pytest.approx(expected)
    assert weights.capped_T.numpy().tolist() == outside.astype(float).tolist()
    assert outside.any() and not outside.all()
    loss = build("clipped", importance=config, aggregate="token_mean")
    _, gradient = value_and_gradient(loss, out, micro)
    _, plain = value_and_gradient(build("clipped", aggregate="token_mean"), *rows.micro())
    assert gradient == pytest.approx(expected * plain)


def test_importance_weights_are_1_on_policy_and_bounded_far_from_it():
    logp = torch.tensor([-0.3, -1.7, -2.0, -500.0], requires_grad=True)
    micro = MicroBatch(
        tokens={},
        rows={},
        examples={},
        row_T=torch.tensor([0, 0, 0, 0]),
        length_R=torch.tensor([4.0]),
        example_R=torch.tensor([0]),
        totals=Totals(tokens=4.0, rows=1.0, examples=1.0),
    )
    truncated = PolicyImportanceConfig()
    for config in (truncated, PolicyImportanceConfig(kind="mask", level="sequence"), OFF):
        weight, capped = importance_weight(logp, logp.detach().clone(), micro, config)
        assert weight.tolist() == [1.0] * 4 and capped.tolist() == [0.0] * 4
        assert not weight.requires_grad
    behavior = torch.tensor([-0.3 + math.log(2), -1.7 - math.log(5), -502.0, 0.0])
    weight, capped = importance_weight(logp, behavior, micro, truncated)
    assert weight.tolist() == pytest.approx([0.5, 2.0, 2.0, 0.0])
    assert capped.tolist() == [0.0, 1.0, 1.0, 0.0]
    icepop = PolicyImportanceConfig(kind="mask", cap=6.0, floor=0.6)
    weight, _ = importance_weight(logp, behavior, micro, icepop)
    assert weight.tolist() == pytest.approx([0.0, 5.0, 0.0, 0.0])
    assert importance_weight(logp, behavior, micro, OFF).weight_T.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    "settings",
    [{"floor": 0.5}, {"kind": "mask", "floor": 2.0}, {"kind": "mask", "cap": None, "floor": 0.5}],
)
def test_a_floor_without_its_mask_is_refused(settings):
    with pytest.raises(ValueError, match="floor"):
        PolicyImportanceConfig(**settings)

"""Supervised fine-tuning against plain float64 numpy, and its invariances."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayhf.errors import ConfigError
from rayhf.losses.base import MicroBatch, Totals
from rayhf.losses.sft import SFTLoss

ROWS = [[-0.5, -1.25, -3.0], [-2.0], [], [-0.1, -0.2]]
EXPECTED = {
    "token_mean": (0.5 + 1.25 + 3.0 + 2.0 + 0.1 + 0.2) / 6,
    "sequence_mean": (4.75 / 3 + 2.0 + 0.0 + 0.15) / 4,
    "sequence_sum": (4.75 + 2.0 + 0.0 + 0.3) / 4,
}


def totals_of(rows):
    return Totals(tokens=sum(map(len, rows)), rows=len(rows), examples=len(rows))


def micro_of(rows, totals, *, entropy=None, **tokens):
    """The log-probs (leaf, float64) and the micro-batch holding `rows`, one example each."""
    lengths = [len(row) for row in rows]
    micro = MicroBatch(
        tokens=tokens,
        rows={},
        examples={},
        row_T=torch.tensor([r for r, n in enumerate(lengths) for _ in range(n)], dtype=torch.int64),
        length_R=torch.tensor(lengths, dtype=torch.float32),
        example_R=torch.arange(len(rows)),
        totals=totals,
        entropy_T=entropy,
    )
    return torch.tensor(
        [x for row in rows for x in row], dtype=torch.float64, requires_grad=True
    ), micro


@pytest.mark.parametrize("how", EXPECTED)
def test_value_is_the_mean_negative_log_likelihood(how):
    logp_T, micro = micro_of(ROWS, totals_of(ROWS))
    out = SFTLoss(aggregate=how)(logp_T, micro)
    assert out.loss.item() == pytest.approx(EXPECTED[how], abs=1e-12)
    assert out.metrics["learner/loss"].item() == pytest.approx(EXPECTED[how], abs=1e-12)
    assert out.metrics["sft/nll"].item() == pytest.approx(EXPECTED["token_mean"], abs=1e-12)
    assert out.metrics["sft/nll_response"].item() == pytest.approx(
        EXPECTED["sequence_sum"], abs=1e-12
    )
    assert not any(value.requires_grad for value in out.metrics.values())


def test_gradient_is_equal_for_every_token():
    logp_T, micro = micro_of(ROWS, totals_of(ROWS))
    SFTLoss()(logp_T, micro).loss.backward()
    np.testing.assert_allclose(logp_T.grad, np.full(6, -1 / 6), atol=1e-15)


def test_entropy_is_reported_if_computed():
    loss = SFTLoss()
    entropy_T = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    assert loss.entropy == "metric"
    with_it = loss(*micro_of(ROWS, totals_of(ROWS), entropy=entropy_T)).metrics
    assert with_it["policy/entropy"].item() == pytest.approx(3.5)
    assert "policy/entropy" not in loss(*micro_of(ROWS, totals_of(ROWS))).metrics


def test_behavior_logprobs_do_not_matter():
    unknown_T = torch.full((6,), torch.nan, dtype=torch.float64)
    logp_T, micro = micro_of(ROWS, totals_of(ROWS), behavior_logp=unknown_T)
    assert SFTLoss()(logp_T, micro).loss.item() == pytest.approx(EXPECTED["token_mean"])


def test_empty_micro_batch_is_zero_not_nan():
    for rows in ([], [[]]):
        logp_T, micro = micro_of(rows, Totals(tokens=0, rows=len(rows), examples=len(rows)))
        out = SFTLoss()(logp_T, micro)
        out.loss.backward()
        assert out.loss.item() == 0.0 and all(value.item() == 0.0 for value in out.metrics.values())


def test_unknown_aggregate_is_refused_and_loss_is_picklable():
    with pytest.raises(ConfigError, match="token_mean"):
        SFTLoss(aggregate="mean")(*micro_of(ROWS, totals_of(ROWS)))
    assert pickle.loads(pickle.dumps(SFTLoss())) == SFTLoss()


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.floats(-50, 0), max_size=5), min_size=1, max_size=6),
    cut=st.integers(0, 6),
    how=st.sampled_from(sorted(EXPECTED)),
    seed=st.integers(0, 99),
)
def test_order_and_sharding_do_not_matter(rows, cut, how, seed):
    totals, loss = totals_of(rows), SFTLoss(aggregate=how)
    whole = loss(*micro_of(rows, totals)).loss.item()
    shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    parts = [loss(*micro_of(part, totals)).loss.item() for part in (shuffled[:cut], shuffled[cut:])]
    assert sum(parts) == pytest.approx(whole, rel=1e-9, abs=1e-12)

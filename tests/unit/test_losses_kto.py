"""KTO against the paper's equation in plain Python, and its invariances."""

import math
import pickle

import pytest
import torch

from rayhf.config.registry import LOSSES
from rayhf.losses.base import MicroBatch, Totals
from rayhf.losses.kto import KTOLoss, KTOLossConfig

LOGPS = [[-0.5, -1.25], [-2.0], [-0.1, -0.2, -0.3], [-4.0]]
REFS = [[-0.75, -1.5], [-1.0], [-0.1, -0.1, -0.1], [-7.0]]
UP = [1.0, 0.0, 0.0, 1.0]
KL = 0.4
CONFIG = KTOLossConfig(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
TOTALS = Totals(tokens=7, rows=4, examples=4, scalars={"desirable": sum(UP), "kl": 4 * KL})


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x))


def micro_of(indices):
    lengths = [len(LOGPS[i]) for i in indices]

    def flat(values):
        return torch.tensor([x for i in indices for x in values[i]], dtype=torch.float64)

    micro = MicroBatch(
        tokens={"ref_logp": flat(REFS)},
        rows={},
        examples={
            "desirable": torch.tensor([UP[i] for i in indices]),
            "kl": torch.full((len(indices),), KL, dtype=torch.float64),
        },
        row_T=torch.tensor([r for r, n in enumerate(lengths) for _ in range(n)]),
        length_R=torch.tensor(lengths, dtype=torch.float32),
        example_R=torch.arange(len(indices)),
        totals=TOTALS,
    )
    return flat(LOGPS).requires_grad_(), micro


def expected():
    """Ethayarajh et al. 2024, eq. 8: mean of lambda_y - v(x, y)."""
    terms = []
    for logps, refs, up in zip(LOGPS, REFS, UP, strict=True):
        reward = sum(logps) - sum(refs)
        weight, sign = (1.5, 1.0) if up else (0.5, -1.0)
        terms.append(weight - weight * sigmoid(0.3 * sign * (reward - KL)))
    return sum(terms) / 4


def test_value_and_metrics():
    out = KTOLoss(CONFIG)(*micro_of(range(4)))
    assert out.loss.item() == pytest.approx(expected(), abs=1e-12)
    rewards = [0.3 * (sum(a) - sum(b)) for a, b in zip(LOGPS, REFS, strict=True)]
    up, down = (rewards[0] + rewards[3]) / 2, (rewards[1] + rewards[2]) / 2
    assert out.metrics["kto/desirable_reward"].item() == pytest.approx(up)
    assert out.metrics["kto/undesirable_reward"].item() == pytest.approx(down)
    assert out.metrics["kto/margin"].item() == pytest.approx(up - down)
    assert out.metrics["kto/kl"].item() == pytest.approx(KL)


def test_shares_of_micro_batches_add_up():
    loss = KTOLoss(CONFIG)
    whole = loss(*micro_of(range(4)))
    parts = [loss(*micro_of(part)) for part in ([2], [0, 1], [3])]
    for name, value in whole.metrics.items():
        assert sum(part.metrics[name].item() for part in parts) == pytest.approx(value.item())


def test_gradient_raises_thumbs_up_and_lowers_thumbs_down():
    logp_T, micro = micro_of(range(4))
    KTOLoss(CONFIG)(logp_T, micro).loss.backward()
    signs = [up for up, row in zip(UP, LOGPS, strict=True) for _ in row]
    assert [float(g < 0) for g in logp_T.grad] == signs


def test_extreme_ratios_stay_finite():
    logp_T, micro = micro_of(range(4))
    out = KTOLoss(CONFIG)((logp_T * 5000).detach().requires_grad_(), micro)
    assert out.loss.isfinite()


def test_found_by_name_and_picklable():
    loss = LOSSES.build(CONFIG)
    assert pickle.loads(pickle.dumps(loss)) == loss == KTOLoss(CONFIG)

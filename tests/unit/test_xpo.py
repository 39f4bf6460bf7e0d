"""XPO: the initial policy's completions, the exploration bonus, and engines without a learner."""

import numpy as np
import pytest
import torch
from campaigns import make_config, metrics_of, run_campaign
from pydantic import ValidationError
from test_losses_selfplay import row, run, totals_of

from rayhf.algorithms.base import frozen_policies, policies_of
from rayhf.algorithms.xpo import XPO, XPOConfig
from rayhf.errors import ConfigError
from rayhf.learner.micro_batch import build_micro_batch
from rayhf.losses.preference import Sigmoid, SigmoidConfig
from rayhf.losses.xpo import XPOLoss
from rayhf.planning.placement import actor_specs
from rayhf.planning.preflight import check_settings
from rayhf.types import Example

INITIAL = {"chosen_initial": 1.0, "rejected_initial": 0.0}
OWN = {"chosen_initial": 0.0, "rejected_initial": 1.0}
LABELED = {"chosen_initial": 0.0, "rejected_initial": 0.0}
EXAMPLES = [
    Example(rows=(row([-1.0, -2.0], ref=[-1.5, -1.0]), row([-0.5], ref=[-1.0])), scalars=OWN),
    Example(rows=(row([-3.0], ref=[-2.0]), row([-1.0, -1.0], ref=[-2.0, -0.5])), scalars=INITIAL),
    Example(rows=(row([-1.0], ref=[-1.5]), row([-2.0], ref=[-1.5])), scalars=LABELED),
]
LOGPS = [[-1.0, -2.0], [-0.5], [-3.0], [-1.0, -1.0], [-1.0], [-2.0]]


def test_bonus_lowers_the_initial_policys_completions_only():
    alpha = 0.25
    plain = Sigmoid(SigmoidConfig(beta=0.5))
    with_bonus = XPOLoss(plain, alpha)
    before, gradients = run(plain, EXAMPLES, LOGPS)
    after, changed = run(with_bonus, EXAMPLES, LOGPS)
    # The second and the third row are the initial policy's; three pairs in the step.
    assert after.loss.item() - before.loss.item() == pytest.approx(alpha * (-0.5 - 3.0) / 3)
    assert np.subtract(changed, gradients) == pytest.approx([0, alpha / 3, alpha / 3, 0, 0, 0])
    assert after.metrics["xpo/initial_logp"].item() == pytest.approx(-3.5 / 2)
    assert after.metrics["xpo/initial_chosen"].item() == 0.5
    # Of the policy's own completions, the first and the fourth row.
    assert after.metrics["reference/kl"].item() == pytest.approx((-0.5 + 0.5) / 2)


def test_gradient_equals_finite_differences():
    loss = XPOLoss(Sigmoid(SigmoidConfig(beta=0.5)), 0.1)
    micro = build_micro_batch(EXAMPLES, totals_of(EXAMPLES), "cpu")
    flat = torch.tensor(np.concatenate(LOGPS), dtype=torch.float64)
    values = flat.clone().requires_grad_()
    loss(values, micro).loss.backward()
    for i in range(len(flat)):
        step = torch.zeros_like(flat)
        step[i] = 1e-4
        # Importance weights carry no gradient: these rows are on-policy at `flat`.
        up = off_policy_free(loss, flat + step, flat, micro)
        down = off_policy_free(loss, flat - step, flat, micro)
        assert values.grad[i].item() == pytest.approx((up - down) / 2e-4, rel=1e-3, abs=1e-7)


def off_policy_free(loss, values, behavior, micro):
    micro.tokens["old_logp"] = behavior
    result = loss(values, micro).loss.item()
    del micro.tokens["old_logp"]
    return result


def test_each_pair_is_one_completion_of_each_policy(tmp_path):
    config = make_config(tmp_path, algorithm={"type": "xpo"})
    roles = run_campaign(config)
    examples = [e for b in roles.learners["policy"].batches for e in b.examples]
    assert {e.scalars["chosen_initial"] + e.scalars["rejected_initial"] for e in examples} == {1.0}
    for example in examples:
        rows = {r.sample: r for r in example.rows}
        assert np.isfinite(rows[0].tokens["behavior_logp"]).all()
        # Otherwise the loss would correct for the initial policy's sampling.
        assert np.isnan(rows[1].tokens["behavior_logp"]).all()
        own = example.rows[0].sample == 1
        assert example.scalars["chosen_initial"] == float(own)
    last = metrics_of(config)[-1]
    assert last["policy/version"] == 4 and last["initial/version"] == 0
    assert roles.rollouts["policy"].version == 4 and roles.rollouts["initial"].version == 0
    assert roles.rollouts["initial"].verified == [0] and list(roles.learners) == ["policy"]


def test_a_frozen_policy_has_engines_and_no_learner(tmp_path):
    config = make_config(tmp_path, algorithm={"type": "xpo"}, rollout={"engines": 2})
    algorithm = XPO(XPOConfig())
    assert policies_of(algorithm) == ("policy",) and frozen_policies(algorithm) == ("initial",)
    specs = actor_specs(config, critic=False, reference=True, frozen=("initial",))
    roles = [spec.role for spec in specs]
    assert roles.count("rollout initial") == 2 and "learner initial" not in roles


def test_another_reference_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="xpo compares with the initial policy"):
        XPOConfig(reference={"type": "previous"})
    with pytest.raises(ValidationError):
        XPOConfig(samples=4)
    config = make_config(tmp_path, algorithm={"type": "xpo"}, reference={"model": "other"})
    with pytest.raises(ConfigError, match=r"reference.model is other, but xpo's reference"):
        check_settings(config)

"""Drift from the initial policy, against an enumerated KL; identical answers in self-play."""

import math

import numpy as np
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeLearner

from rayhf.algorithms.base import with_ties
from rayhf.campaign.drift import drift_kl, initial_rows
from rayhf.config.guards import GuardsConfig
from rayhf.monitoring.guards import check_guards
from rayhf.types import Example, Row, win_rates


def row_of(logprobs):
    return Row(
        prompt_id="p",
        sample=0,
        prompt_ids=(1,),
        response_ids=tuple(range(len(logprobs))),
        tokens={"behavior_logp": np.log(np.array(logprobs, dtype=np.float32))},
    )


def test_drift_is_the_kl_from_the_initial_policy():
    """One-token answers in the initial policy's own proportions: 5, 3 and 2 of ten."""
    start, now = [0.5, 0.3, 0.2], [0.7, 0.2, 0.1]
    tokens = [0] * 5 + [1] * 3 + [2] * 2
    rows = [row_of([start[t]]) for t in tokens]
    logp = [np.log(np.array([now[t]], dtype=np.float32)) for t in tokens]
    exact = sum(p * math.log(p / q) for p, q in zip(start, now, strict=True))
    assert drift_kl(rows, logp) == pytest.approx(exact, abs=1e-6)
    assert drift_kl(rows, [row.tokens["behavior_logp"] for row in rows]) == 0.0


def test_only_sampled_rows_are_measured():
    given = row_of([0.5, math.nan])
    sampled = [Example(rows=(row_of([0.5]), row_of([0.4]))) for _ in range(100)]
    earlier = Example(rows=(row_of([0.1]),), iterations_back=1)
    rows = initial_rows([Example(rows=(given,)), earlier, *sampled])
    assert len(rows) == 64 and all(len(row.response_ids) == 1 for row in rows)


def test_drift_is_the_same_after_a_resume(tmp_path):
    class Learner(FakeLearner):
        async def outputs(self, rows, *, temperature, **_):
            return [np.full(len(r.response_ids), -0.1 * self.steps, np.float32) for r in rows]

    algorithm = {"type": "iterative_dpo", "samples": 4, "disjoint_iterations": False}
    whole = make_config(tmp_path / "whole", algorithm=algorithm)
    broken = make_config(tmp_path / "broken", algorithm=algorithm)
    run_campaign(whole, learner=Learner())
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(broken, learner=Learner(fail_at=3))
    run_campaign(broken, learner=Learner())
    drifts = [[line.get("policy/drift_kl") for line in metrics_of(c)] for c in (whole, broken)]
    assert drifts[0] == drifts[1] and len(set(drifts[0][1:])) == 4


@pytest.mark.parametrize(("name", "shown"), [("iterative_dpo", True), ("online_dpo", False)])
def test_drift_is_shown_where_the_reference_moves(tmp_path, name, shown):
    settings = {"disjoint_iterations": False} if name == "iterative_dpo" else {}
    config = make_config(tmp_path, algorithm={"type": name, "samples": 4, **settings})
    run_campaign(config)
    assert {"policy/drift_kl" in line for line in metrics_of(config)[1:]} == {shown}


def test_guards_see_drift_and_displacement():
    limits = GuardsConfig()
    drifting = [{"iteration": i, "policy/drift_kl": 150.0} for i in range(3)]
    displaced = [{"iteration": i, "reference/kl": -150.0} for i in range(3)]
    assert [(a.guard, a.level) for a in check_guards(drifting, limits)] == [("drift", "warn")]
    (alarm,) = check_guards(displaced, limits)
    assert (alarm.guard, alarm.level) == ("kl", "pause") and "is -150 nats" in alarm.message


def test_identical_answers_tie():
    win = np.array([[0.5, 0.501, 0.9], [0.499, 0.5, 0.7], [0.1, 0.3, 0.5]])
    rates = win_rates(with_ties(win, [(1, 2), (1, 2), (3,)]), include_self=True)
    # Both copies: (0.5 + 0.5 + 0.8) / 3; the other: (0.2 + 0.2 + 0.5) / 3.
    assert rates == pytest.approx([0.6, 0.6, 0.3])
    assert (with_ties(win, [(1,), (2,), (3,)]) == win).all()
    same = with_ties(win, [(1,), (1,), (1,)])
    assert np.ptp(win_rates(same, include_self=True)) == 0.0


def test_unknown_comparisons_stay_unknown():
    win = np.array([[0.5, np.nan, 0.9], [np.nan, 0.5, np.nan], [0.1, np.nan, 0.5]])
    tied = with_ties(win, [(1,), (2,), (1,)])
    assert np.isnan(tied[0, 1]) and tied[0, 2] == 0.5

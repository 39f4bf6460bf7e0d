"""Evaluations in a campaign: when they measure, what a checkpoint keeps, which guards they mute."""

import pytest
from campaigns import make_config, metrics_of, run_campaign
from counting_evaluation import Counting
from fakes import FakeLearner

from rayhf.errors import PausedError

EVALUATION = {"type": "counting_evaluation:Counting"}


class CollapsingLearner(FakeLearner):
    """Its entropy falls to a hundredth after three steps."""

    async def step(self, batch, loss):
        metrics = await super().step(batch, loss)
        return {**metrics, "policy/entropy": 1.0 if self.steps <= 3 else 0.01}


@pytest.mark.parametrize(
    ("every", "runs", "expected"),
    [(1, (2, 4), [1, 2, 3, 4, 5]), (3, (4,), [1, 2, 3]), (0, (4,), [1, 2])],
)
def test_interval_and_state_across_a_restart(tmp_path, every, runs, expected):
    """Measured before the first and after the last iteration, and every `every` in between."""
    evaluations = {"count": {**EVALUATION, "every": every}}
    for iterations in runs:
        config = make_config(tmp_path, run={"iterations": iterations}, evaluations=evaluations)
        run_campaign(config, evaluations={"count": Counting()})
    lines = metrics_of(config)
    assert [x["counting/measured"] for x in lines if "counting/measured" in x] == expected


def test_evaluation_mutes_its_guards(tmp_path):
    guards = {"entropy": {"unless_gain": None}}
    run = {"iterations": 8}
    paused = make_config(tmp_path / "a", run=run, guards=guards)
    with pytest.raises(PausedError, match="entropy"):
        run_campaign(paused, learner=CollapsingLearner())
    muted = make_config(tmp_path / "b", run=run, guards=guards, evaluations={"count": EVALUATION})
    run_campaign(muted, learner=CollapsingLearner(), evaluations={"count": Counting()})
    assert metrics_of(muted)[-1]["iteration"] == 8

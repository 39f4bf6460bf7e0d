"""Refills: further prompts in place of those whose groups teach nothing."""

import pyarrow.parquet as pq
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeLearner, FakeRollout, FakeScorer, make_prompts

from rayhf.campaign.refill import check_refill
from rayhf.config.registry import ALGORITHMS
from rayhf.data.prompts import PromptSet
from rayhf.errors import ConfigError
from rayhf.monitoring.audit import audit
from rayhf.planning.preflight import check_settings
from rayhf.types import Scored

PROMPTS = PromptSet(prompts=tuple(make_prompts(24)), duplicates=0, label="test")


class Solved(FakeScorer):
    """Two of three prompts are solved by every completion: their groups teach nothing."""

    async def score(self, requests):
        outcomes = await super().score(requests)
        return [
            own if int(request.prompt.prompt_id[1:]) % 3 == 0 else (Scored(value=1.0),) * len(own)
            for request, own in zip(requests, outcomes, strict=True)
        ]


class Dies(FakeRollout):
    """Fails at one call."""

    def __init__(self, fail_at):
        super().__init__()
        self.fail_at = fail_at

    async def generate(self, requests, *, version):
        if len(self.calls) == self.fail_at:
            raise RuntimeError("killed")
        return await super().generate(requests, version=version)


def config_of(directory, budget=4.0, **more):
    algorithm = {"type": "dapo", "samples": 4, "refill": {"budget": budget}, "overlong_buffer": 0}
    return make_config(directory, algorithm=algorithm, **more)


def samples_of(config, iteration):
    return pq.read_table(config.run.dir / f"samples/iteration-{iteration:06d}.parquet").to_pylist()


def trained(roles):
    """The prompts of every optimizer step."""
    steps = roles.learners["policy"].batches
    return [{e.rows[0].prompt_id for e in step.examples} for step in steps]


def test_batch_is_filled_and_counted(tmp_path):
    config = config_of(tmp_path)
    roles = run_campaign(config, scorer=Solved(), prompts=PROMPTS)
    lines = metrics_of(config)[1:]
    assert any(line["rollout/refilled"] for line in lines)
    for number, line in enumerate(lines, start=1):
        prompts = {row["prompt_id"] for row in samples_of(config, number)}
        assert len(prompts) == 4 + line["rollout/refilled"] <= 16
        assert line["rollout/tokens"] == 3 * 4 * len(prompts)
        useful = trained(roles)[number - 1]
        assert all(int(prompt[1:]) % 3 == 0 for prompt in useful)
        assert len(useful) == 4 - line["rollout/refill_missing"]
    assert sum(line["rollout/refill_missing"] == 0 for line in lines) >= 2
    assert [finding for finding in audit(config.run.dir, deep=True) if finding.problem] == []


def test_budget_bounds_what_is_explored(tmp_path):
    config = config_of(tmp_path, budget=1.5)
    learner = FakeLearner()
    run_campaign(config, scorer=FakeScorer(Scored(value=1.0)), learner=learner, prompts=PROMPTS)
    for line in metrics_of(config)[1:]:
        assert (line["rollout/refilled"], line["rollout/refill_missing"]) == (2, 4)
        assert line["ppo/groups_uniform"] == line["selection/no_signal"] == 1.0
    assert learner.steps == 0


def test_own_prompts_are_the_same_without_refills(tmp_path):
    with_refills, without = config_of(tmp_path / "a"), config_of(tmp_path / "b", budget=1.0)
    for config in (with_refills, without):
        run_campaign(config, scorer=Solved(), prompts=PROMPTS)
    assert "rollout/refilled" not in metrics_of(without)[1]
    for iteration in range(1, 5):
        first = [row["prompt_id"] for row in samples_of(with_refills, iteration)]
        assert first[:16] == [row["prompt_id"] for row in samples_of(without, iteration)]


def test_steps_get_equal_shares_of_the_prompts_with_a_signal(tmp_path):
    config = config_of(tmp_path, budget=6.0, learner={"prompts_per_step": 2})
    roles = run_campaign(config, scorer=Solved(), prompts=PROMPTS)
    assert {line["rollout/refill_missing"] for line in metrics_of(config)[1:]} == {0}
    assert [len(step) for step in trained(roles)] == [2] * 8


@pytest.mark.parametrize("fail_at", (2, 5, 8, 11))
def test_killed_run_continues_with_the_same_refills(tmp_path, fail_at):
    """In any wave of any iteration, of the first attempt and between commits."""
    whole, broken = config_of(tmp_path / "whole"), config_of(tmp_path / "broken")
    first = run_campaign(whole, scorer=Solved(), prompts=PROMPTS)
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(broken, scorer=Solved(), prompts=PROMPTS, rollout=Dies(fail_at))
    second = run_campaign(broken, scorer=Solved(), prompts=PROMPTS)
    assert metrics_of(broken) == metrics_of(whole)
    assert trained(second) == trained(first)[-len(trained(second)) :]
    for iteration in range(1, 5):
        assert samples_of(whole, iteration) == samples_of(broken, iteration)


def test_resumed_waves_are_answered_by_the_journal(tmp_path):
    """A learner that dies after the exploration: nothing of it is generated again."""
    config = config_of(tmp_path)
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(config, scorer=Solved(), prompts=PROMPTS, learner=FakeLearner(fail_at=0))
    rollout = FakeRollout()
    run_campaign(config, scorer=Solved(), prompts=PROMPTS, heldout=(), rollout=rollout)
    lines = metrics_of(config)[1:]
    generated = sum(len(call) for call in rollout.calls)
    assert lines[0]["rollout/refilled"] > 0
    assert generated == sum(4 + line["rollout/refilled"] for line in lines[1:])


@pytest.mark.parametrize("staleness", [1, 2])
def test_refills_with_generation_running_ahead(tmp_path, staleness):
    config = config_of(tmp_path, run={"iterations": 6, "max_staleness": staleness})
    rollout = FakeRollout(delay=0.003)
    run_campaign(config, scorer=Solved(), prompts=PROMPTS, rollout=rollout)
    lines = metrics_of(config)[1:]
    assert any(line["rollout/refilled"] for line in lines) and rollout.busy_at_update == 0
    assert max(line["staleness/max"] for line in lines) == staleness


def test_too_few_prompts_for_the_budget_are_refused(tmp_path):
    config = config_of(tmp_path, budget=7.0)
    algorithm = ALGORITHMS.build(config.algorithm)
    with pytest.raises(ConfigError, match=r"explore 28 prompts, and prompts\.train has 24"):
        check_refill(config, algorithm, PROMPTS)
    config = config_of(tmp_path, budget=6.0)
    check_refill(config, ALGORITHMS.build(config.algorithm), PROMPTS)


def test_plan_counts_the_largest_number_of_responses(tmp_path):
    config = config_of(tmp_path, budget=2.5)
    _, derived = check_settings(config)
    assert derived.samples_per_iteration == 10 * 4
    assert ("responses per iteration", "at most 40") in derived.table(config)

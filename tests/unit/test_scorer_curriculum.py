"""Curricula: weights of a rubric's criteria that follow how often the policy meets them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaigns import make_config, metrics_of, run_campaign
from fakes import FakeLearner
from pydantic import ValidationError
from score_requests import request

from launch.eval_scores import check_judge
from rayhf.config.models import ModelName
from rayhf.config.scorers import CurriculumConfig
from rayhf.config.serve import ServedScorersConfig
from rayhf.errors import CheckpointError, ConfigError
from rayhf.monitoring.catalog import find
from rayhf.scorer.build import check_heldout
from rayhf.scorer.combine import Combination
from rayhf.scorer.comparisons import compare_scores
from rayhf.scorer.curriculum import Curriculum
from rayhf.scorer.judge_config import JudgeConfig
from rayhf.scorer.retrying import RetryingScorer
from rayhf.types import Comparison, Invalid, Outcome, Scored, ScoreRequest

WEIGHTS = {"always": 1.0, "half": 1.0, "fault": -2.0}
MEANS = {"always": 1.0, "half": 0.5, "fault": 0.25}


def scored(always: float, half: float, fault: float) -> Scored:
    return Scored(value=-7.0, parts={"votes": 1.0, "always": always, "half": half, "fault": fault})


def judge(**curriculum: Any) -> JudgeConfig:
    return JudgeConfig(
        model=ModelName("j"),
        rubric={  # type: ignore[arg-type]
            "criteria": [
                {"criterion": "Is it even?", "name": "even"},
                {"criterion": "Is it small?", "name": "small", "weight": 2},
            ],
            "curriculum": curriculum,
        },
    )


def test_weights_follow_the_policy() -> None:
    curriculum = Curriculum(WEIGHTS, CurriculumConfig(memory=0.0, smallest=0.1))
    assert curriculum.factors == dict.fromkeys(WEIGHTS, 1.0)
    assert curriculum.score(scored(1, 0, 0)) == pytest.approx((1 + 0 + 2) / 4)
    curriculum.observe(MEANS)
    assert curriculum.factors == {"always": 0.1, "half": 1.0, "fault": 0.75}
    assert curriculum.score(scored(1, 0, 0)) == pytest.approx((0.1 + 0 + 1.5) / 2.6)
    assert curriculum.score(scored(1, 1, 1)) == pytest.approx((0.1 + 1 + 0) / 2.6)
    curriculum.observe({"always": 0.5, "another": 0.0})  # forgotten: its weight comes back
    assert curriculum.factors == {"always": 1.0, "half": 1.0, "fault": 0.75}


def test_rates_are_remembered_and_smallest_1_changes_nothing() -> None:
    curriculum = Curriculum(WEIGHTS, CurriculumConfig(memory=0.5))
    curriculum.observe(MEANS)
    assert curriculum.state_dict() == {"always": 0.75, "half": 0.5, "fault": 0.375}
    fixed = Curriculum(WEIGHTS, CurriculumConfig(smallest=1.0))
    fixed.observe(MEANS)
    assert fixed.factors == dict.fromkeys(WEIGHTS, 1.0)


def test_state_resumes_exactly_and_another_is_refused() -> None:
    one = Curriculum(WEIGHTS, CurriculumConfig())
    one.observe(MEANS)
    other = Curriculum(WEIGHTS, CurriculumConfig())
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state_dict() == one.state_dict() and other.factors == one.factors
    for state, expected in (
        ({"always": 0.5}, "rates of the criteria"),
        (dict.fromkeys(WEIGHTS, 1.5), "expected 0 to 1"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            other.load_state_dict(state)
    assert other.state_dict() == one.state_dict()


def test_score_of_a_combination_has_the_current_weights_and_its_part_the_config_s() -> None:
    combination = Combination([judge(memory=0.0)])
    outcome = Scored(value=2 / 3, parts={"votes": 1.0, "even": 0.0, "small": 1.0})
    answers: list[list[tuple[Outcome, ...]]] = [[(outcome, Invalid(reason="no"))]]

    def value() -> float:
        [(first, second)] = combination.scores(answers, [request("a", "b")])
        assert isinstance(first, Scored) and isinstance(second, Invalid)
        assert first.parts["judge"] == outcome.value and first.parts["judge/small"] == 1.0
        return first.value

    assert value() == pytest.approx(2 / 3)
    combination.observe({"scorer/judge/even/reward_mean": 0.5, "scorer/judge/small/reward_mean": 1})
    assert value() == pytest.approx(0.2 / 1.2)
    metrics = combination.curriculum_metrics()
    assert metrics == {"judge/even/curriculum": 1.0, "judge/small/curriculum": 0.1}
    assert all(find(f"scorer/{name}") for name in metrics)
    with pytest.raises(CheckpointError, match=r"curricula of the scorers none, the config of"):
        combination.load_state_dict({"normalizers": {}})


class Judged:
    """A scorer role over a real Combination; the answers are facts about the tokens."""

    def __init__(self, **curriculum: Any) -> None:
        self.combination = Combination([judge(**curriculum)])
        self.calls: list[dict[str, float]] = []
        """Factors at each call."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        self.calls.append(self.combination.curriculum_metrics())
        rows = [tuple(_answers(c.token_ids) for c in each.completions) for each in requests]
        return self.combination.scores([rows], requests)

    async def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        return [compare_scores(outcomes) for outcomes in await self.score(requests)]

    async def observe(self, metrics: Mapping[str, float]) -> None:
        self.combination.observe(metrics)

    async def take_counts(self) -> dict[str, float]:
        return self.combination.curriculum_metrics()

    async def state_dict(self) -> dict[str, Any]:
        return self.combination.state_dict()

    async def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.combination.load_state_dict(state)


def _answers(token_ids: Any) -> Outcome:
    parts = {"even": float(token_ids[0] % 2 == 0), "small": float(token_ids[0] < 40)}
    return Scored(value=(parts["even"] + 2 * parts["small"]) / 3, parts=parts)


def test_campaign_and_its_resume(tmp_path: Path) -> None:
    algorithm = {"type": "grpo", "samples": 4, "kl": {"coef": 0.0}}

    def config_of(name: str) -> Any:
        run = {"iterations": 4, "eval_every": 0, "checkpoint_every": 1}
        return make_config(tmp_path / name, algorithm=algorithm, run=run)

    whole = config_of("whole")
    broken = config_of("broken")
    first = Judged()
    retrying = RetryingScorer(first, attempts=1, tolerated=0.0, report=lambda kind, text: None)
    run_campaign(whole, scorer=retrying, heldout=())
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(broken, scorer=Judged(), heldout=(), learner=FakeLearner(fail_at=2))
    again = Judged()
    run_campaign(broken, scorer=again, heldout=())
    assert metrics_of(whole) == metrics_of(broken)
    assert again.combination.state_dict() == first.combination.state_dict()
    lines = metrics_of(whole)[1:]
    names = ("scorer/judge/even/", "scorer/judge/small/")
    rates = dict.fromkeys(names, 0.5)
    for line in lines:
        for name in names:  # the weights of an iteration come from the ones before it
            factor = max(0.1, 4 * rates[name] * (1 - rates[name]))
            assert line[f"{name}curriculum"] == pytest.approx(factor)
            rates[name] = 0.5 * rates[name] + 0.5 * line[f"{name}reward_mean"]
    assert lines[3]["scorer/judge/small/curriculum"] < 0.9
    assert np.ptp([line["scorer/judge/small/curriculum"] for line in lines]) > 0
    assert len({json.dumps(call) for call in first.calls}) == 4  # fixed within an iteration


def test_refusals() -> None:
    with pytest.raises(ValidationError, match="curriculum follows criteria that all prompts share"):
        JudgeConfig(model=ModelName("j"), rubric={"column": "r", "curriculum": {}})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"train\[0\]: judge has a curriculum, whose weights"):
        check_heldout([judge()], where="scorer.train")
    with pytest.raises(ConfigError, match=r"judge\[0\]: judge has a curriculum"):
        check_judge([judge()], "judge")
    with pytest.raises(ValidationError, match="a server does not see the campaign's iterations"):
        ServedScorersConfig(train=(judge(),))

"""Prompts of reasoning-gym's tasks, and the tasks' own scores of answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from score_requests import request

from rayhf.data.readers import named_rows, open_source
from rayhf.data.reasoning_gym import GymSourceConfig
from rayhf.errors import ConfigError
from rayhf.scorer.build import build_scorer
from rayhf.scorer.protocol import ScorerSetup
from rayhf.scorer.reasoning_gym import GymScorerConfig
from rayhf.scorer.reasoning_gym_rule import score
from rayhf.types import Scored

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3},
    "leg_counting": {},
}


def rows_of(task: str, **settings: Any) -> list[dict[str, Any]]:
    config = GymSourceConfig(task=task, size=3, seed=7, settings=settings)
    source = open_source(config, base=Path(), key="k")
    return [dict(row) for _, row in named_rows(source, key="k")]


@pytest.mark.parametrize("task", TASKS)
def test_task_scores_answers_to_its_own_prompts(task: str) -> None:
    rows = rows_of(task, **TASKS[task])
    assert rows == rows_of(task, **TASKS[task])
    assert len({row["prompt"] for row in rows}) == 3
    for row in rows:
        entry = row["reasoning_gym"]
        assert score(f"So <answer> {row['answer']} </answer>", reasoning_gym=entry) == 1.0
        assert score(row["answer"], reasoning_gym=entry) == 1.0
        assert score(f"<answer>{row['answer']}7</answer>", reasoning_gym=entry) < 1.0


def test_tasks_and_settings_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^k: reasoning_gym has no task 'chain_sm'; did you"):
        rows_of("chain_sm")
    with pytest.raises(ConfigError, match=r"^k: reasoning_gym task chain_sum: .*max_trms"):
        rows_of("chain_sum", max_trms=3)


def test_scorer_of_a_config_scores_rows_of_two_tasks() -> None:
    rows = [rows_of(task, **TASKS[task])[0] for task in TASKS]
    requests = [
        request(row["answer"], "no idea", question=row["prompt"], answer=row["answer"])
        for row in rows
    ]
    requests = [
        replace(each, prompt=replace(each.prompt, row=row))
        for each, row in zip(requests, rows, strict=True)
    ]
    scorer = build_scorer([GymScorerConfig()], ScorerSetup(base=Path.cwd()))
    try:
        outcomes = scorer.score(requests)
    finally:
        scorer.close()
    for right, wrong in outcomes:
        assert isinstance(right, Scored) and right.value == 1.0
        assert isinstance(wrong, Scored) and wrong.value < 1.0

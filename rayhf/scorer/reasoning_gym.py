"""The scorer `reasoning_gym`: the task's own score of an answer, for rows of that source.

It is a built-in rule: the tasks' scoring functions parse what the policy wrote, so they run in
processes with limits on time, memory and files like a user's function.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rayhf.data.reasoning_gym import generate
from rayhf.scorer.rule import Rule
from rayhf.scorer.rule_config import RuleConfig

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class GymScorerConfig(RuleConfig):
    """The task's own score of an answer, from 0 to 1."""

    type: str = "reasoning_gym"
    function: str = "rayhf.scorer.reasoning_gym:score"

    @property
    def default_name(self) -> str:
        """Name where the config gives none."""
        return "reasoning_gym"


class GymScorer(Rule):
    """Reasoning-gym's own score of an answer to one of its tasks."""

    Config = GymScorerConfig


def score(completion: str, *, reasoning_gym: Mapping[str, Any]) -> float:
    """Return the task's score of the text in the last <answer> tag, or of the whole completion.

    `reasoning_gym` is the column of that name, with which the task generates its entry again.
    """
    tagged = _TAGGED.findall(completion)
    answer = (tagged[-1] if tagged else completion).strip()
    index = reasoning_gym["index"]
    task = generate(**{key: value for key, value in reasoning_gym.items() if key != "index"})
    return float(task.score_answer(answer, task[index]))

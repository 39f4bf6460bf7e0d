"""The scorer `reasoning_gym`: the task's own score of an answer, for rows of that source.

It is a built-in rule: the tasks' scoring functions parse what the policy wrote, so they run in
processes with limits on time, memory and files like a user's function.
"""

from __future__ import annotations

from rayhf.scorer.rule import Rule
from rayhf.scorer.rule_config import RuleConfig


class GymScorerConfig(RuleConfig):
    """The task's own score of an answer, from 0 to 1."""

    type: str = "reasoning_gym"
    function: str = "rayhf.scorer.reasoning_gym_rule:score"

    @property
    def default_name(self) -> str:
        """Name where the config gives none."""
        return "reasoning_gym"


class GymScorer(Rule):
    """Reasoning-gym's own score of an answer to one of its tasks."""

    Config = GymScorerConfig

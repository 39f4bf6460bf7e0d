"""The environment of the arithmetic task: a wrong answer may be tried again, for half the reward.

In: the policy's answers. Out: whether an answer was right, and the question once more where not.
The tiny policy has never seen a second turn, and hardly ever answers it well; what it learns is to
be right at the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import PositiveInt

from rayhf.config.environments import EnvironmentConfig
from rayhf.episodes import StepResult
from rayhf.tiny.arithmetic import correct
from rayhf.types import Message


class SecondTryConfig(EnvironmentConfig):
    """How many answers."""

    type: str = "second_try"
    tries: PositiveInt = 2
    """Answers that an episode may have."""


class SecondTry:
    """Arithmetic questions with a second try; try k is worth 1 / k."""

    Config = SecondTryConfig

    def __init__(self, config: SecondTryConfig) -> None:
        self._tries = config.tries
        self._try = 0
        self._question = ""
        self._answer = ""

    async def reset(self, row: Mapping[str, Any], *, seed: int) -> None:
        """Keep the prompt, which asks the question."""
        self._question = str(row["prompt"])
        self._answer = str(row["answer"])

    async def step(self, message: Message) -> StepResult:
        """Score an answer; ask again after a wrong one."""
        self._try += 1
        score = correct(
            message["content"],
            prompt=self._question,
            reference_answer=self._answer,
            finish_reason="stop",
        )
        return StepResult(
            messages=f"No. {self._question}",
            reward=score / self._try,
            done=bool(score) or self._try == self._tries,
            metrics={"solved": score, "solved_later": score * (self._try > 1)},
        )

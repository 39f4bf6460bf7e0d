"""The environment of the tiny game: an opponent that plays the same move in every round.

A round is a turn of the policy. The opponent's move follows from the prompt's text in no way that
could be learned, and the policy reads it after its own: what wins is known from the second round
on. Without reading the replies a policy gets half of the points in expectation, however it plays.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from pydantic import PositiveInt

from rayhf.config.environments import EnvironmentConfig
from rayhf.tiny.game import ANSWERS
from rayhf.types import Message, StepResult


class RepeatingOpponentConfig(EnvironmentConfig):
    """How many rounds."""

    type: str = "repeating_opponent"
    rounds: PositiveInt = 3
    """Rounds of an episode."""


class RepeatingOpponent:
    """Rock, paper, scissors against an opponent that repeats its move."""

    Config = RepeatingOpponentConfig

    def __init__(self, config: RepeatingOpponentConfig) -> None:
        self._rounds = config.rounds
        self._round = 0
        self._move = 0

    async def reset(self, row: Mapping[str, Any], *, seed: int) -> None:
        """Draw the opponent's move; the prompt asks for the first one of the policy.

        All episodes of a prompt have the same one: what differs between them is the policy's play.
        """
        self._move = random.Random(str(row["prompt"])).randrange(len(ANSWERS))

    async def step(self, message: Message) -> StepResult:
        """Return 1 for a win, 1/2 for a draw, 0 for a loss or no move, and the opponent's move."""
        self._round += 1
        text = message["content"].strip()
        is_move = text in ANSWERS
        ahead = (ANSWERS.index(text) - self._move) % len(ANSWERS) if is_move else 2
        return StepResult(
            messages=f"I play {ANSWERS[self._move]}. Your move?",
            reward=(0.5, 1.0, 0.0)[ahead] / self._rounds,
            done=self._round == self._rounds,
            metrics={"moves": float(is_move)},
        )

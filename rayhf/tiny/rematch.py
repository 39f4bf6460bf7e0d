"""The environment of the cyclic task: two rounds against an opponent that plays one move in both.

In: the policy's moves. Out: after the first round, its result; after the second, a reward of 1 for
a win. The opponent's move is drawn from the episode's seed, each with probability 1/3: the first
round is worth nothing, and a policy that does not read its result wins the second with probability
1/3, whatever it plays. One that reads it can always win: after a win it plays its move again, after
a draw what beats it, after a loss what beats the move that beat it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal

from rayhf.config.environments import EnvironmentConfig
from rayhf.episodes import StepResult
from rayhf.tiny.game import ANSWERS
from rayhf.types import Message


class RematchConfig(EnvironmentConfig):
    """What the policy is told."""

    type: str = "rematch"
    tells: Literal["result", "move", "nothing"] = "result"
    """After the first round. `nothing` is a control: no policy wins more than 1/3."""


class Rematch:
    """Two rounds against the same hidden move; only the second one counts."""

    Config = RematchConfig

    def __init__(self, config: RematchConfig) -> None:
        self._tells = config.tells
        self._first: str | None = None
        self._opponent = 0

    async def reset(self, row: Mapping[str, Any], *, seed: int) -> None:
        """Draw the opponent's move; keep the prompt, which asks for a move."""
        self._opponent = random.Random(seed).randrange(len(ANSWERS))

    async def step(self, message: Message) -> StepResult:
        """Tell the result of the first round, or score the second."""
        result = self._result(message["content"].strip())
        if self._first is not None:
            won = float(result == "win")
            return StepResult(reward=won, done=True, metrics={"won": won})
        self._first = result
        told = {"result": result, "move": ANSWERS[self._opponent], "nothing": "again"}
        return StepResult(
            messages=f"{told[self._tells]}. Your move?",
            metrics={"won_first": float(result == "win")},
        )

    def _result(self, move: str) -> str:
        """Return how a move fares: each one beats the one before it in ANSWERS."""
        if move not in ANSWERS:
            return "no move"
        return ("draw", "win", "loss")[(ANSWERS.index(move) - self._opponent) % len(ANSWERS)]

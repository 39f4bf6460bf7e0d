"""The environment of the cyclic task: two rounds against an opponent that plays one move in both.

In: the policy's moves. Out: after the first round, the opponent's move, which it plays once more;
after the second, a reward of 1 for a win. The opponent's move is drawn from the episode's seed,
each with probability 1/3, and the first round is worth nothing: a policy that does not read the
environment's message wins with probability 1/3, whatever it plays. One that reads it can always
win. The tiny policy has never seen a second turn, and wins a third of them at the start.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from rayhf.config.environments import EnvironmentConfig
from rayhf.episodes import StepResult
from rayhf.tiny.game import ANSWERS
from rayhf.types import Message


class RematchConfig(EnvironmentConfig):
    """Whether the opponent's move is told."""

    type: str = "rematch"
    hidden: bool = False
    """Do not tell it. Then no policy wins more than 1/3: a control."""


class Rematch:
    """Two rounds against the same hidden move; only the second one counts."""

    Config = RematchConfig

    def __init__(self, config: RematchConfig) -> None:
        self._hidden = config.hidden
        self._round = 0
        self._opponent = 0

    async def reset(self, row: Mapping[str, Any], *, seed: int) -> None:
        """Draw the opponent's move; keep the prompt, which asks for a move."""
        self._opponent = random.Random(seed).randrange(len(ANSWERS))

    async def step(self, message: Message) -> StepResult:
        """Tell the opponent's move after the first round; score the second."""
        self._round += 1
        # Each move beats the one before it in ANSWERS.
        won = float(message["content"].strip() == ANSWERS[(self._opponent + 1) % len(ANSWERS)])
        if self._round == 2:
            return StepResult(reward=won, done=True, metrics={"won": won})
        told = "again" if self._hidden else ANSWERS[self._opponent]
        return StepResult(messages=f"{told}. Your move?", metrics={"won_first": won})

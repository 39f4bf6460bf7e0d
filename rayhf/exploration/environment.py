"""The protocol of an environment: a class of the user's that answers the policy in an episode.

This one wants a word and is done when the policy says it:

    class WordConfig(rayhf.EnvironmentConfig):
        type: str = "my_environments:Word"
        word: str = "please"

    class Word:
        Config = WordConfig

        def __init__(self, config):
            self.config = config

        async def reset(self, row, *, seed):
            return None

        async def step(self, message):
            if self.config.word in message["content"]:
                return rayhf.StepResult(reward=1.0, done=True)
            return rayhf.StepResult(messages="Say the word.")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from rayhf.config.environments import EnvironmentConfig
from rayhf.episodes import StepResult
from rayhf.types import Message


class Environment(Protocol):
    """One episode: an object is made for each, as `Class(config)`, and forgotten at its end.

    It runs in a process with limits (rayhf/environments/process.py), beside other episodes: it must
    not block for long. What it does may depend on its arguments only, so that a resumed iteration
    repeats it: its random numbers come from `seed`. An error that it raises ends the episode, which
    then has no score.

    Two methods are optional: a coroutine method `close()`, called when the episode is over, and a
    class method `prepare(config)`, called once in each process before any episode.
    """

    Config: ClassVar[type[EnvironmentConfig]]

    async def reset(
        self, row: Mapping[str, Any], *, seed: int
    ) -> str | Message | Sequence[Message] | None:
        """Start the episode of a prompt's row.

        Returns the conversation that the policy answers; None keeps the prompt as it is.
        """
        ...

    async def step(self, message: Message) -> StepResult:
        """Answer the policy's message, {"role": "assistant", "content": ...}.

        The content is text without special tokens; of a thinking model, what follows its thinking.
        """
        ...

"""Data types of episodes: what an environment is asked and answers, and what became of it.

A Completion (types.py) has its Episode; the rows made of it have its Inserted tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from rayhf.types import ByValue, Failed, FloatArray, Invalid, Message, TokenArray, token_array


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What an environment answers to a message of the policy, or to the start of an episode."""

    messages: str | Message | Sequence[Message] = ()
    """What the policy reads next: messages, or the text of a user's message. At the start, the
    conversation in place of the prompt's; none keeps the prompt."""
    reward: float = 0.0
    """For the policy's message."""
    done: bool = False
    """Whether the episode is over; the policy does not read the messages then."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the environment's own, added up over an episode: environment/<name>."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRequest:
    """A request to an environment: start an episode, answer a message in it, or forget it."""

    prompt_id: str
    number: int
    """Position among the requests of one prompt's exploration."""
    environment: str
    """Name of the environment."""
    episode: str
    """Identifies the episode."""
    row: Mapping[str, object] | None = None
    """At the start, the prompt's row."""
    seed: int = 0
    """At the start, the seed of everything random in the episode."""
    message: Message | None = None
    """The policy's; None at the start and at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A message of an episode."""

    role: str
    content: str
    """Text without special tokens; of a thinking model, what follows its thinking."""
    tokens: int
    """Tokens that it has in the context; 0 for a last message, which nothing was generated after.
    """
    reward: float = 0.0
    """The environment's, for a message of the policy."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Episode(ByValue):
    """What an environment made of a completion of several turns."""

    environment: str
    """Its name."""
    turns: tuple[Turn, ...]
    """All messages after the prompt, in order."""
    ended: Literal["done", "turns", "tokens", "reply_tokens", "failed"]
    """Who ended it: the environment, one of the limits on turns, generated tokens and tokens of
    replies, or an error of the environment."""
    inserted: Inserted | None = None
    """The tokens of its replies; None without."""
    context_ids: TokenArray | None = None
    """The tokens that it begins after, where the environment gave other messages than the prompt's.
    """
    problem: Invalid | Failed | None = None
    """Why it failed; then it has no score."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The environment's own, added up over its turns."""

    @property
    def reward(self) -> float:
        """Sum of the rewards."""
        return sum(turn.reward for turn in self.turns)

    def token_rewards(self, tokens: int) -> FloatArray:
        """Return each turn's reward on its last token: (T,), of the completion's own tokens."""
        rewards = np.zeros(tokens, dtype=np.float32)
        end = 0
        for turn in self.turns:
            if turn.role == "assistant":
                end += turn.tokens
                if end:
                    rewards[end - 1] += turn.reward
        return rewards


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inserted(ByValue):
    """Tokens between those of a response, which the policy did not write: (I,).

    The model reads them. They are not trained on, and nothing about them is measured or counted.
    """

    token_ids: TokenArray
    before: TokenArray
    """For each of them, the number of response tokens before it; ascending."""

    def fill(self, response_ids: TokenArray) -> TokenArray:
        """Return the response with the inserted tokens in their places: (T,) -> (T + I,)."""
        return token_array(np.insert(response_ids, self.before, self.token_ids))

    def positions(self, tokens: int) -> npt.NDArray[np.int64]:
        """Return the places of the response's own `tokens` tokens in what `fill` returns: (T,)."""
        own = np.arange(tokens)
        return own + np.searchsorted(self.before, own, side="right")


def inserted_tokens(
    token_ids: Sequence[int] | None, before: Sequence[int] | None
) -> Inserted | None:
    """Return the inserted tokens of two lists; None where there are none."""
    if not (token_ids and before):
        return None
    return Inserted(token_ids=token_array(token_ids), before=token_array(before))

"""Data types of episodes: what an environment is asked and answers, and what became of it.

A Completion (types.py) has its Episode; the rows made of it have its Inserted tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from rayhf.types import (
    ByValue,
    Completion,
    Failed,
    FloatArray,
    Invalid,
    Message,
    TokenArray,
    float_array,
    split_versions,
    token_array,
)

Ended = Literal["done", "turns", "tokens", "reply_tokens", "failed"]
"""Who ended an episode: the environment, one of the limits on turns, generated tokens and tokens of
replies, or an error of the environment."""


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
    """What an environment made of a completion of one or several turns."""

    environment: str
    """Its name."""
    turns: tuple[Turn, ...]
    """All messages after the prompt, in order; of a part of an episode, its own."""
    ended: Ended | None
    """None for a part after which the episode goes on."""
    inserted: Inserted | None = None
    """The tokens of its replies; None without. A last one, after which nothing was generated, is
    left out."""
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


def join_turns(parts: Sequence[Completion]) -> Completion:
    """Return consecutive parts of an episode as one completion.

    The tokens between two parts are a reply: the later part's context ends with them.
    """
    episodes = [part_of(completion) for completion in parts]
    contexts = [each.context_ids for each in episodes if each.context_ids is not None]
    metrics: dict[str, float] = {}
    for episode in episodes:
        for name, value in episode.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value
    joined = replace(
        episodes[-1],
        turns=tuple(turn for episode in episodes for turn in episode.turns),
        inserted=replies_between(parts, contexts),
        context_ids=contexts[0],
        metrics=metrics,
    )
    oldest = parts[-1].policy_version
    token_versions: TokenArray | None = None
    if any(len(part.token_ids) for part in parts):
        oldest, token_versions = split_versions(np.concatenate(list(map(_versions, parts))))
    return replace(
        parts[-1],
        seed=parts[0].seed,
        token_ids=token_array(np.concatenate([part.token_ids for part in parts])),
        logprobs=float_array(np.concatenate([part.logprobs for part in parts])),
        thinking_tokens=sum(part.thinking_tokens for part in parts),
        policy_version=oldest,
        token_versions=token_versions,
        episode=joined,
    )


def part_of(completion: Completion) -> Episode:
    """Return the part of an episode that a turn of it has."""
    assert completion.episode is not None
    return completion.episode


def _versions(completion: Completion) -> TokenArray:
    if completion.token_versions is not None:
        return completion.token_versions
    return np.full(len(completion.token_ids), completion.policy_version, np.int32)


def replies_between(parts: Sequence[Completion], contexts: Sequence[TokenArray]) -> Inserted | None:
    """Return the tokens between consecutive parts, beside those within them, of the whole.

    `contexts` are what each part continues. Nothing is left after the last token. None where no
    token is between others.
    """
    ids: list[int] = []
    before: list[int] = []
    generated = 0
    end = len(contexts[0])
    for part, context in zip(parts, contexts, strict=True):
        ids += context[end:].tolist()
        before += [generated] * (len(context) - end)
        end = len(context) + len(part.token_ids)
        within = None if part.episode is None else part.episode.inserted
        if within is not None:
            ids += within.token_ids.tolist()
            before += (within.before + generated).tolist()
            end += len(within.token_ids)
        generated += len(part.token_ids)
    kept = sum(place < generated for place in before)
    return inserted_tokens(ids[:kept], before[:kept])

"""Votes of a judge: what it is asked, what it replied, and how replies are counted.

In: questions by key, with a reader for their replies. Out: the votes on each, or why there are
none. A vote that cannot be read, or was cut off before its end, is left out; where none is left
there is no score but a reason that quotes the judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pydantic import JsonValue

from rayhf.scorer.comparisons import Problem
from rayhf.types import Failed, Invalid, JudgeReply, derive_seed

T = TypeVar("T")
Key = tuple[str, ...]
"""Everything that a question depends on: seeds follow from it."""
_QUOTED_CHARS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a judge is asked: once per seed."""

    text: str
    seeds: tuple[int, ...]
    schema: Mapping[str, JsonValue] | None = None
    """JSON schema of the reply, for servers that can enforce one."""
    needs_probabilities: bool = False
    """Whether the probabilities of the reply's first token are needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a judge replied to one seed of a question."""

    text: str
    is_complete: bool = True
    """False where it was cut off at max_tokens."""
    probabilities: Mapping[str, float] | None = None
    """Of the first token's most likely candidates, in lower case; None where they are unknown."""


class JudgeModel(Protocol):
    """A language model, in this process or behind an endpoint."""

    def answer(self, questions: Sequence[Question]) -> list[tuple[Reply, ...] | Problem]:
        """Return one reply per seed of each question, in order, or why there are none."""
        ...

    def take_counts(self) -> dict[str, float]:
        """Return what was counted since the last call (requests, tokens)."""
        ...

    def close(self) -> None:
        """Release memory and connections."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Item(Generic[T]):
    """A question, and how to read the replies to it."""

    question: Question
    read: Callable[[Reply], T | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Votes(Generic[T]):
    """The votes on one question: at least one that could be read."""

    values: tuple[T, ...]
    replies: tuple[JudgeReply, ...]
    """What the judge wrote in each vote, also in those that could not be read."""

    @property
    def unparsable(self) -> int:
        """Number of votes that could not be read."""
        return len(self.replies) - len(self.values)


Result = Votes[T] | Invalid | Failed


def seeds_of(key: Key, votes: int) -> tuple[int, ...]:
    """Return one seed per vote."""
    return tuple(derive_seed("judge", *key, vote) for vote in range(votes))


def ask(model: JudgeModel, items: Mapping[Key, Item[T] | Problem]) -> dict[Key, Result[T]]:
    """Ask every question once, and count the votes."""
    results: dict[Key, Result[T]] = {}
    asked: dict[Key, Item[T]] = {}
    for key, item in items.items():
        if isinstance(item, Item):
            asked[key] = item
        else:
            results[key] = item
    replies = model.answer([item.question for item in asked.values()]) if asked else []
    expected = [len(item.question.seeds) for item in asked.values()]
    returned = [
        len(reply) if isinstance(reply, tuple) else seeds
        for reply, seeds in zip(replies, expected, strict=False)
    ]
    if returned != expected:
        failed = Failed(
            reason=f"the judge's model returned {sum(returned)} votes on {len(replies)} "
            f"questions, expected {sum(expected)} on {len(asked)}"
        )
        return results | dict.fromkeys(asked, failed)
    for (key, item), reply in zip(asked.items(), replies, strict=True):
        results[key] = _count(reply, item.read) if isinstance(reply, tuple) else reply
    return results


def _count(replies: Sequence[Reply], read: Callable[[Reply], T | None]) -> Votes[T] | Invalid:
    votes = [read(reply) for reply in replies]
    values = tuple(vote for vote in votes if vote is not None)
    if values:
        written = tuple(
            JudgeReply(text=reply.text, left_out=vote is None)
            for reply, vote in zip(replies, votes, strict=True)
        )
        return Votes(values=values, replies=written)
    first = replies[0]
    quoted = first.text
    if len(quoted) > _QUOTED_CHARS:
        quoted = f"... {quoted[-_QUOTED_CHARS:]}"
    cut = "" if first.is_complete else " (cut off at max_tokens)"
    return Invalid(
        reason=f"no verdict in any of {len(replies)} votes; the first says {quoted!r}{cut}"
    )

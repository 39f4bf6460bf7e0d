"""The scorer role: all configured scorers behind one or several equal actors, and their client.

In: completions of prompts. Out: outcomes or comparisons, and the running statistics.

Actors give each scorer's raw answers and keep no state; the client combines and normalizes them in
one place, so that the result does not depend on which actor gave which answer.

Synchronization: calls run side by side, as many as the actor was created for; `progress` runs
beside them. The requests of a call are divided in order: among the actors, and into chunks with a
deadline each. A lost actor is replaced, and its part of the call is repeated.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate, chain
from typing import Any

from ray.actor import ActorHandle

from actors.process import ReportsAlive
from actors.supervise import SupervisedActor
from rayhf.config.scorers import WEIGHTED_SUM, CombineConfig, ScorerEntryConfig
from rayhf.models.hub import obtain
from rayhf.scorer.combine import Combination
from rayhf.scorer.parts import Answers, Parts, Rows
from rayhf.scorer.protocol import ScorerSetup
from rayhf.types import Comparison, Outcome, ScoreRequest

_CHUNK = 1024
"""Completions that an actor gets in one call: run.timeout_s counts for that many."""


class ScorerActor(ReportsAlive):
    """Ray actor around the engines of the configured scorers."""

    def build(self, entries: Sequence[ScorerEntryConfig], setup: ScorerSetup) -> None:
        from rayhf.scorer.build import build_parts

        obtain(tuple(entries))
        self.parts = Parts(build_parts(entries, setup))

    def score(self, requests: Sequence[ScoreRequest]) -> list[Rows]:
        """Return each scorer's outcomes."""
        return self.parts.score(requests)

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Answers]:
        """Return each scorer's comparisons or outcomes."""
        return self.parts.compare(requests)

    def take_counts(self) -> dict[str, float]:
        """Return what the scorers counted since the last call."""
        return self.parts.take_counts()


class ScorerClient:
    """Scorer over equal actors, each of which is replaced when it is lost."""

    def __init__(
        self,
        members: Sequence[SupervisedActor],
        entries: Sequence[ScorerEntryConfig],
        *,
        combine: CombineConfig = WEIGHTED_SUM,
        timeout_s: float,
        calls: int = 1,
    ) -> None:
        self._members = dict.fromkeys(members, 0)
        """Completions that each actor has to score."""
        self._slots = {member: asyncio.Semaphore(calls) for member in members}
        """For the calls that an actor takes at a time: deadlines do not count while one waits."""
        self._combination = Combination(entries, combine)
        normalizes = any(entry.is_normalized for entry in entries)
        self._turn = asyncio.Lock() if normalizes else nullcontext()
        """Calls whose scores are normalized follow each other: the order decides the statistics."""
        self._timeout_s = timeout_s

    async def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        async with self._turn:
            answers = await self._call(lambda actor: actor.score, requests, "score")
            return self._combination.scores(answers, requests)

    async def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        async with self._turn:
            answers = await self._call(lambda actor: actor.compare, requests, "compare")
            return self._combination.comparisons(answers, requests)

    async def observe(self, metrics: Mapping[str, float]) -> None:
        self._combination.observe(metrics)

    async def state_dict(self) -> dict[str, Any]:
        return self._combination.state_dict()

    async def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._combination.load_state_dict(state)

    async def take_counts(self) -> dict[str, float]:
        of_members = await asyncio.gather(
            *(
                member.persist(
                    lambda actor: actor.take_counts.remote(),
                    phase="counts",
                    timeout_s=self._timeout_s,
                )
                for member in self._members
            )
        )
        total = self._combination.curriculum_metrics()
        for counts in of_members:
            for name, count in counts.items():
                total[name] = total.get(name, 0.0) + count
        return total

    async def _call(
        self,
        method: Callable[[ActorHandle], Any],
        requests: Sequence[ScoreRequest],
        phase: str,
    ) -> list[Any]:
        """Return each scorer's answers to all requests."""
        completions = sum(len(request.completions) for request in requests)
        chunks = divide(requests, max(len(self._members), -(-completions // _CHUNK)))
        several = len(chunks) > len(self._members)
        answers = await asyncio.gather(
            *(
                self._call_one(
                    method, chunk, f"{phase}, chunk {i} of {len(chunks)}" if several else phase
                )
                for i, chunk in enumerate(chunks, start=1)
            )
        )
        return [list(chain.from_iterable(of_part)) for of_part in zip(*answers, strict=True)]

    async def _call_one(
        self, method: Callable[[ActorHandle], Any], share: Sequence[ScoreRequest], phase: str
    ) -> Any:
        """Call the least busy actor."""
        member = min(self._members, key=lambda each: self._members[each])
        size = sum(len(request.completions) for request in share)
        self._members[member] += size
        try:
            async with self._slots[member]:
                return await member.persist(
                    lambda actor: method(actor).remote(list(share)),
                    phase=phase,
                    timeout_s=self._timeout_s,
                )
        finally:
            self._members[member] -= size


def divide(requests: Sequence[ScoreRequest], shares: int) -> list[Sequence[ScoreRequest]]:
    """Divide requests into at most so many consecutive shares of about equally many completions.

    It depends on the requests alone. There is at least one share, which may be empty.
    """
    sizes = [len(request.completions) for request in requests]
    ends = list(accumulate(sizes, initial=0))  # completions before each request, and in all
    divided: list[Sequence[ScoreRequest]] = []
    start = 0
    for number in range(1, shares + 1):
        goal = ends[-1] * number / shares
        end = bisect_left(ends, goal, lo=start) if number < shares else len(requests)
        if end > start:
            divided.append(requests[start:end])
        start = max(start, end)
    return divided or [requests]

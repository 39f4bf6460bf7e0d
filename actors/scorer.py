"""The scorer role: all configured scorers behind one actor, and its client.

In: completions of a prompt. Out: outcomes or comparisons, and the scorer's state.

Synchronization: calls run one after the other, except for `progress`, which runs beside them. A
lost actor is replaced in its last state, and the call is repeated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.process import ReportsProcess
from actors.remote import wait
from actors.supervise import SupervisedActor
from actors.watch import Call
from rayhf.config.scorers import WEIGHTED_SUM, CombineConfig, ScorerEntryConfig
from rayhf.models.hub import obtain
from rayhf.scorer.protocol import ScorerSetup
from rayhf.types import Comparison, Outcome, ScoreRequest

State = dict[str, Any]
"""State of a scorer (running normalizers), as JSON values."""
CONCURRENCY_GROUPS = {"watch": 1}
"""Option of `ray.remote` for ScorerActor: a poll of its progress must not wait for a long call."""


class ScorerActor(ReportsProcess):
    """Ray actor around the engines of the configured scorers."""

    def build(
        self,
        entries: Sequence[ScorerEntryConfig],
        setup: ScorerSetup,
        *,
        combine: CombineConfig = WEIGHTED_SUM,
    ) -> None:
        from rayhf.scorer.build import build_scorer

        obtain(tuple(entries))
        self.engine = build_scorer(entries, setup, combine=combine)

    @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
    def progress(self) -> float:
        """Return a number that grows as long as the process runs.

        How long one call may take is limited by its deadline alone.
        """
        return time.monotonic()

    def score(self, requests: Sequence[ScoreRequest]) -> tuple[list[tuple[Outcome, ...]], State]:
        """Return the outcomes, and the scorer's state after them."""
        return self.engine.score(requests), self.engine.state_dict()

    def compare(self, requests: Sequence[ScoreRequest]) -> tuple[list[Comparison], State]:
        """Return the comparisons, and the scorer's state after them."""
        return self.engine.compare(requests), self.engine.state_dict()

    def state_dict(self) -> State:
        return self.engine.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.engine.load_state_dict(state)


class ScorerClient:
    """Scorer over one actor, which is replaced when it is lost."""

    def __init__(self, member: SupervisedActor, *, timeout_s: float) -> None:
        self._member = member
        self._timeout_s = timeout_s
        self._state: State | None = None
        """The scorer's state after its last response, with which it arrived."""
        member.prepare = self._restore

    async def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        outcomes, self._state = await self._persist(
            lambda actor: actor.score.remote(list(requests)), "score"
        )
        return list(outcomes)

    async def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        comparisons, self._state = await self._persist(
            lambda actor: actor.compare.remote(list(requests)), "compare"
        )
        return list(comparisons)

    async def state_dict(self) -> State:
        if self._state is None:
            self._state = await self._persist(lambda actor: actor.state_dict.remote(), "state")
        return dict(self._state or {})

    async def load_state_dict(self, state: Mapping[str, Any]) -> None:
        await self._persist(lambda actor: actor.load_state_dict.remote(dict(state)), "state")
        self._state = dict(state)

    async def _persist(self, call: Call, phase: str) -> Any:
        return await self._member.persist(call, phase=phase, timeout_s=self._timeout_s)

    async def _restore(self, actor: ActorHandle) -> None:
        """Load the last known state into a new actor."""
        if self._state is not None:
            call = actor.load_state_dict.remote(self._state)
            await wait(call, name="a new scorer", phase="state", timeout_s=self._timeout_s)

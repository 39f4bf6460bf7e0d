"""The scorer role: rules in child processes, reward and preference models, and judges, behind one
actor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from actors.remote import wait
from actors.supervise import ProcessInfo, SupervisedActor, process_info
from rayhf.config.scorers import WEIGHTED_SUM, CombineConfig, ScorerEntryConfig
from rayhf.scorer.protocol import ScorerSetup
from rayhf.types import Comparison, Outcome, ScoreRequest


class ScorerActor:
    """A shell around the engines of the configured scorers."""

    def build(
        self,
        entries: Sequence[ScorerEntryConfig],
        setup: ScorerSetup,
        *,
        combine: CombineConfig = WEIGHTED_SUM,
    ) -> None:
        from rayhf.scorer.build import build_scorer

        self.engine = build_scorer(entries, setup, combine=combine)

    @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
    def progress(self) -> float:
        """Grows as long as the process runs; how long a call may take is its deadline's
        business."""
        return time.monotonic()

    def process_info(self) -> ProcessInfo:
        return process_info()

    def score(
        self, requests: Sequence[ScoreRequest]
    ) -> tuple[list[tuple[Outcome, ...]], dict[str, Any]]:
        """The outcomes, and the state after them."""
        return self.engine.score(requests), self.engine.state_dict()

    def compare(self, requests: Sequence[ScoreRequest]) -> tuple[list[Comparison], dict[str, Any]]:
        return self.engine.compare(requests), self.engine.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return self.engine.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.engine.load_state_dict(state)


class ScorerClient:
    """Scorer over one actor, which is replaced when it is lost: its last state is put back, and the
    call is repeated."""

    def __init__(self, engine: SupervisedActor, *, timeout_s: float) -> None:
        self._engine, self._timeout_s = engine, timeout_s
        self._state: dict[str, Any] | None = None
        """After the last answer; it comes with the answers, so that the two belong together."""
        engine.prepare = self._equip

    async def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        answers, self._state = await self._ask(
            lambda actor: actor.score.remote(list(requests)), "score"
        )
        return list(answers)

    async def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        answers, self._state = await self._ask(
            lambda actor: actor.compare.remote(list(requests)), "compare"
        )
        return list(answers)

    async def state_dict(self) -> dict[str, Any]:
        if self._state is None:
            self._state = await self._ask(lambda actor: actor.state_dict.remote(), "state")
        return dict(self._state or {})

    async def load_state_dict(self, state: Mapping[str, Any]) -> None:
        await self._ask(lambda actor: actor.load_state_dict.remote(dict(state)), "state")
        self._state = dict(state)

    async def _ask(self, call: Callable[[Any], Any], phase: str) -> Any:
        return await self._engine.persist(call, phase=phase, timeout_s=self._timeout_s)

    async def _equip(self, actor: Any) -> None:
        """Bring a new actor to the last state that was heard of."""
        if self._state is not None:
            call = actor.load_state_dict.remote(self._state)
            await wait(call, who="a new scorer", phase="state", timeout_s=self._timeout_s)


# The watch must be answered while a long call is under way; everything else takes turns.
RemoteScorerActor = ray.remote(concurrency_groups={"watch": 1})(ScorerActor)

"""The scorer role: rules in child processes, reward and preference models, and judges, behind one actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from actors.remote import wait
from rayhf.config.scorers import WEIGHTED_SUM, CombineConfig, ScorerEntry
from rayhf.experience import Comparison, Outcome, ScoreRequest


class ScorerActor:
    """A shell around the engines of the configured scorers."""

    def build(
        self,
        entries: Sequence[ScorerEntry],
        *,
        combine: CombineConfig = WEIGHTED_SUM,
        device: str,
        threads: int | None,
        base: Path,
    ) -> None:
        from rayhf.scorer.build import build_scorer

        self.engine = build_scorer(entries, combine=combine, device=device, threads=threads, base=base)

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        return self.engine.score(requests)

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        return self.engine.compare(requests)

    def state_dict(self) -> dict[str, Any]:
        return self.engine.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.engine.load_state_dict(state)


class RemoteScorer:
    """Scorer over one actor."""

    def __init__(self, actor: Any, *, name: str, timeout_s: float) -> None:
        self._actor, self._name, self._timeout_s = actor, name, timeout_s

    async def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        answer: list[tuple[Outcome, ...]] = await self._answer(self._actor.score.remote(list(requests)), phase="score")
        return answer

    async def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        answer: list[Comparison] = await self._answer(self._actor.compare.remote(list(requests)), phase="compare")
        return answer

    async def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = await self._answer(self._actor.state_dict.remote(), phase="state")
        return state

    async def load_state_dict(self, state: Mapping[str, Any]) -> None:
        await self._answer(self._actor.load_state_dict.remote(dict(state)), phase="state")

    async def _answer(self, call: Any, *, phase: str) -> Any:
        return await wait(call, who=self._name, phase=phase, timeout_s=self._timeout_s)


RemoteScorerActor = ray.remote(ScorerActor)

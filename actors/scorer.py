"""The scorer role: rules in child processes and reward models, behind one actor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from actors.remote import wait
from rayhf.config.schema import ScorerEntry
from rayhf.experience import Outcome, ScoreRequest


class ScorerActor:
    """A shell around the engines of the configured scorers."""

    def build(self, entries: Sequence[ScorerEntry], *, device: str, threads: int | None, base: Path) -> None:
        from rayhf.scorer.build import build_scorer

        self.engine = build_scorer(entries, device=device, threads=threads, base=base)

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        return self.engine.score(requests)


class RemoteScorer:
    """Scorer over one actor."""

    def __init__(self, actor: Any, *, name: str, timeout_s: float) -> None:
        self._actor, self._name, self._timeout_s = actor, name, timeout_s

    async def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        call = self._actor.score.remote(list(requests))
        answer: list[tuple[Outcome, ...]] = await wait(call, who=self._name, phase="score", timeout_s=self._timeout_s)
        return answer


RemoteScorerActor = ray.remote(ScorerActor)

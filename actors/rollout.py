"""The rollout role: vLLM engines in actors, and the pool that spreads requests over them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import ray

from actors.remote import wait, wait_all
from rayhf.config.schema import Dtype, RolloutConfig
from rayhf.experience import Completion, GenerateRequest, WeightSnapshot

if TYPE_CHECKING:
    from rayhf.rollout.engine import UpdateReport


class RolloutActor:
    """A shell around one RolloutEngine; its environment variables are set before this process starts."""

    def build(
        self,
        model: Path,
        config: RolloutConfig,
        *,
        dtype: Dtype,
        max_length: int,
        seed: int,
        device: Literal["cpu", "gpu"],
    ) -> None:
        from rayhf.rollout.engine import RolloutEngine

        self.engine = RolloutEngine(model, config, dtype=dtype, max_length=max_length, seed=seed, device=device)

    async def generate(self, requests: Sequence[GenerateRequest], version: int) -> list[tuple[Completion, ...]]:
        return await asyncio.wrap_future(self.engine.submit(requests, version=version))

    async def update(self, snapshot: WeightSnapshot, *payloads: npt.NDArray[np.uint8]) -> UpdateReport:
        return await asyncio.to_thread(self.engine.update, snapshot, list(payloads))


class RolloutPool:
    """Rollout over one or more engines."""

    def __init__(self, actors: Sequence[Any], *, timeout_s: float) -> None:
        self._actors, self._timeout_s = actors, timeout_s
        self._names = [f"rollout engine {i}" for i in range(len(actors))]
        self._load = [0] * len(actors)

    async def generate(self, requests: Sequence[GenerateRequest], *, version: int) -> list[tuple[Completion, ...]]:
        """One request goes to the least busy engine; several are dealt out in turn, so that equal calls are dealt equally."""
        if len(requests) == 1:
            engine = min(range(len(self._actors)), key=lambda i: self._load[i])
            return await self._ask(engine, requests, version)
        hands = [requests[i :: len(self._actors)] for i in range(len(self._actors))]
        answers = await asyncio.gather(*(self._ask(i, hand, version) for i, hand in enumerate(hands) if hand))
        results: list[tuple[Completion, ...]] = [()] * len(requests)
        for i, answer in enumerate(answers):
            results[i :: len(self._actors)] = answer
        return results

    async def _ask(self, engine: int, requests: Sequence[GenerateRequest], version: int) -> list[tuple[Completion, ...]]:
        work = sum(len(r.seeds) for r in requests)
        self._load[engine] += work
        try:
            call = self._actors[engine].generate.remote(list(requests), version)
            answer: list[tuple[Completion, ...]] = await wait(
                call, who=self._names[engine], phase="generate", timeout_s=self._timeout_s
            )
            return answer
        finally:
            self._load[engine] -= work

    async def update(self, snapshot: WeightSnapshot) -> None:
        """Every engine fetches the same buckets from the object store and confirms version, checksum and probe, or raises."""
        payloads = [bucket.payload for bucket in snapshot.buckets]
        light = replace(snapshot, buckets=tuple(replace(bucket, payload=None) for bucket in snapshot.buckets))
        calls = [actor.update.remote(light, *payloads) for actor in self._actors]
        await wait_all(calls, who=self._names, phase="sync", timeout_s=self._timeout_s)


RemoteRollout = ray.remote(RolloutActor)

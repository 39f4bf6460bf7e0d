"""The rollout role: vLLM engines in actors, and the pool that spreads requests over them."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray

from actors.supervise import Supervised, Whereabouts, whereabouts
from actors.transport import Transport
from rayhf.config.schema import Dtype, RolloutConfig
from rayhf.experience import Completion, GenerateRequest, WeightSnapshot

if TYPE_CHECKING:
    from rayhf.rollout.channel import Meeting
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
        sleeps: bool = False,
    ) -> None:
        from rayhf.rollout.engine import RolloutEngine

        self.engine = RolloutEngine(model, config, dtype=dtype, max_length=max_length, seed=seed, device=device, sleeps=sleeps)

    async def generate(self, requests: Sequence[GenerateRequest], version: int) -> list[tuple[Completion, ...]]:
        return await asyncio.wrap_future(self.engine.submit(requests, version=version))

    async def progress(self) -> int:
        """Grows with everything the engine does."""
        return self.engine.stats().progress

    def whereabouts(self) -> Whereabouts:
        return whereabouts()

    async def join_broadcast(self, meeting: Meeting, first: int) -> None:
        await asyncio.to_thread(self.engine.join_broadcast, meeting, first)

    async def update(self, snapshot: WeightSnapshot, *payloads: Any) -> UpdateReport:
        return await asyncio.to_thread(self.engine.update, snapshot, payloads)

    async def sleep(self, keep_weights: bool) -> None:
        await asyncio.to_thread(self.engine.sleep, keep_weights=keep_weights)

    async def wake(self) -> None:
        await asyncio.to_thread(self.engine.wake)


class _LeastBusy:
    """Who has the least to do, without looking at everybody: there may be thousands."""

    def __init__(self, members: int) -> None:
        self._load = [0] * members
        self._order = [(0, number) for number in range(members)]
        """A heap. An entry whose load is not the member's any more counts for nothing; every member has one that counts."""

    def choose(self) -> int:
        """The member with the smallest load, the first among equals; `add` must follow."""
        while True:
            load, number = heapq.heappop(self._order)
            if load == self._load[number]:
                return number

    def add(self, number: int, work: int) -> None:
        self._load[number] += work
        heapq.heappush(self._order, (self._load[number], number))
        if len(self._order) > 4 * len(self._load):
            self._order = sorted((load, number) for number, load in enumerate(self._load))


class RolloutPool:
    """Rollout over one or more engines; an engine that is lost is replaced, and what it was asked is asked again as a whole."""

    def __init__(self, engines: Sequence[Supervised], transport: Transport, *, timeout_s: float) -> None:
        self._engines, self._transport, self._timeout_s = engines, transport, timeout_s
        self._busy = _LeastBusy(len(engines))
        for engine in engines:
            engine.prepare = transport.equip

    async def generate(self, requests: Sequence[GenerateRequest], *, version: int) -> list[tuple[Completion, ...]]:
        """One request goes to the least busy engine; several are dealt out in turn, so that equal calls are dealt equally."""
        if len(requests) == 1:
            return await self._ask(self._busy.choose(), requests, version)
        hands = [requests[i :: len(self._engines)] for i in range(min(len(self._engines), len(requests)))]
        answers = await asyncio.gather(*(self._ask(i, hand, version) for i, hand in enumerate(hands)))
        results: list[tuple[Completion, ...]] = [()] * len(requests)
        for i, answer in enumerate(answers):
            results[i :: len(self._engines)] = answer
        return results

    async def _ask(self, number: int, requests: Sequence[GenerateRequest], version: int) -> list[tuple[Completion, ...]]:
        """A hand is repeated whole: its requests shared the engine's batches, and with them their last bits."""
        engine, work = self._engines[number], sum(len(r.seeds) for r in requests)
        self._busy.add(number, work)
        try:
            answer: list[tuple[Completion, ...]] = await engine.persist(
                lambda actor: actor.generate.remote(list(requests), version), phase="generate", timeout_s=self._timeout_s
            )
            return answer
        finally:
            self._busy.add(number, -work)

    async def update(self, snapshot: WeightSnapshot) -> None:
        await self._transport.deliver(snapshot)

    async def sleep(self) -> None:
        """Every engine gives its GPU up. Its weights stay in host memory unless they are in the object store anyway."""
        keep = self._transport.stored is None
        await self._everyone("sleep", lambda actor: actor.sleep.remote(keep))

    async def wake(self) -> None:
        """Every engine writes again, with the weights it had."""
        if self._transport.stored is None:
            await self._everyone("wake", lambda actor: actor.wake.remote())
        else:
            light, payloads = self._transport.stored
            await self._everyone("wake", lambda actor: actor.update.remote(light, *payloads))

    async def _everyone(self, phase: str, call: Callable[[Any], Any]) -> None:
        await asyncio.gather(*(engine.persist(call, phase=phase, timeout_s=self._timeout_s) for engine in self._engines))


RemoteRollout = ray.remote(RolloutActor)

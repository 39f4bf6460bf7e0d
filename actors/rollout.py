"""The rollout role: vLLM engines in actors, and the pool that spreads requests over them."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray

from actors.supervise import ProcessInfo, SupervisedActor, process_info
from actors.transport import Transport
from rayhf.config.schema import Dtype, RolloutConfig
from rayhf.types import Completion, GenerateRequest, WeightSnapshot

if TYPE_CHECKING:
    from rayhf.rollout.engine import UpdateReport
    from rayhf.weights.broadcast import Rendezvous


class RolloutActor:
    """A shell around one RolloutEngine; its environment variables are set before this process
    starts."""

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

        self.engine = RolloutEngine(
            model,
            config,
            dtype=dtype,
            max_length=max_length,
            seed=seed,
            device=device,
            sleep_mode=sleeps,
        )

    async def generate(
        self, requests: Sequence[GenerateRequest], version: int
    ) -> list[tuple[Completion, ...]]:
        return await asyncio.wrap_future(self.engine.submit(requests, version=version))

    async def progress(self) -> int:
        """Grows with everything the engine does."""
        return self.engine.stats().progress

    def process_info(self) -> ProcessInfo:
        return process_info()

    async def join_broadcast(self, meeting: Rendezvous, first: int) -> None:
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
        """A heap. An entry whose load is not the member's any more counts for nothing; every member
        has one that counts."""

    def least(self) -> int:
        """The smallest load."""
        while self._order[0][0] != self._load[self._order[0][1]]:
            heapq.heappop(self._order)
        return self._order[0][0]

    def choose(self) -> int:
        """The member with the smallest load, the first among equals; `add` must follow."""
        self.least()
        return heapq.heappop(self._order)[1]

    def add(self, number: int, work: int) -> None:
        self._load[number] += work
        heapq.heappush(self._order, (self._load[number], number))
        if len(self._order) > 4 * len(self._load):
            self._order = sorted((load, number) for number, load in enumerate(self._load))


_HAND = 8
"""Single requests that travel together at most."""
_FULL = 2
"""Times an engine's places."""


@dataclass(eq=False, slots=True)
class _Single:
    """A request that came alone, and waits for company."""

    request: GenerateRequest
    version: int
    answer: asyncio.Future[tuple[Completion, ...]]
    hand: Sequence[_Single] = ()
    """Those it travels with, itself too."""
    call: asyncio.Task[None] | None = None


class RolloutPool:
    """Rollout over one or more engines; an engine that is lost is replaced, and what it was asked
    is asked again as a whole.

    A call costs the caller more than what is in it. A single request is a call of its own where an
    engine has a place for it or soon will: its answer must wait for no other. Where every engine
    has so much to do that a request would wait for long, those that come in the same turn of the
    loop travel together, `_HAND` at most, and come back together. Nothing is held back, so no
    engine idles for it: up to half of what such calls are counted for may be written and wait for
    the rest, hence `_FULL`.

    Args:
        places: sequences that one engine writes at the same time.
    """

    def __init__(
        self,
        engines: Sequence[SupervisedActor],
        transport: Transport,
        *,
        places: int,
        timeout_s: float,
    ) -> None:
        self._engines, self._transport, self._timeout_s = engines, transport, timeout_s
        self._busy, self._full = _LeastBusy(len(engines)), _FULL * places
        self._singles: list[_Single] = []
        for engine in engines:
            engine.prepare = transport.join_engine

    async def generate(
        self, requests: Sequence[GenerateRequest], *, version: int
    ) -> list[tuple[Completion, ...]]:
        """One request goes to the least busy engine; several are dealt out in turn, so that equal
        calls are dealt equally."""
        if len(requests) == 1:
            if self._busy.least() >= self._full:
                return [await self._join(requests[0], version)]
            return await self._ask(self._busy.choose(), requests, version)
        hands = [
            requests[i :: len(self._engines)] for i in range(min(len(self._engines), len(requests)))
        ]
        answers = await asyncio.gather(
            *(self._ask(i, hand, version) for i, hand in enumerate(hands))
        )
        results: list[tuple[Completion, ...]] = [()] * len(requests)
        for i, answer in enumerate(answers):
            results[i :: len(self._engines)] = answer
        return results

    async def _join(self, request: GenerateRequest, version: int) -> tuple[Completion, ...]:
        """The answer to one request that travels with others."""
        loop = asyncio.get_running_loop()
        single = _Single(request, version, loop.create_future())
        if not self._singles:
            loop.call_soon(self._send)  # after all who were woken together
        self._singles.append(single)
        try:
            return await single.answer
        except asyncio.CancelledError:
            if single.call is not None and all(other.answer.cancelled() for other in single.hand):
                single.call.cancel()  # nobody waits for it
            raise

    def _send(self) -> None:
        """What gathered, by its version, each hand to whoever is the least busy then."""
        singles, self._singles = self._singles, []
        for version in dict.fromkeys(single.version for single in singles):
            waiting = [
                single
                for single in singles
                if single.version == version and not single.answer.done()
            ]
            for start in range(0, len(waiting), _HAND):
                hand = waiting[start : start + _HAND]
                self._busy.add(
                    number := self._busy.choose(), work := _work(single.request for single in hand)
                )
                call = asyncio.create_task(self._carry(number, hand, version, work))
                for single in hand:
                    single.hand, single.call = hand, call

    async def _carry(self, number: int, hand: Sequence[_Single], version: int, work: int) -> None:
        """Whatever goes wrong goes to those who wait."""
        try:
            answers = await self._persist(number, [single.request for single in hand], version)
        except Exception as error:  # noqa: BLE001  passed on, not swallowed
            for single in hand:
                if not single.answer.done():
                    single.answer.set_exception(error)
        else:
            for single, answer in zip(hand, answers, strict=True):
                if not single.answer.done():  # whoever asked may have been cancelled
                    single.answer.set_result(answer)
        finally:
            self._busy.add(number, -work)
            for single in hand:
                single.hand, single.call = (
                    (),
                    None,
                )  # or they would keep each other, and their answers, until the collector came

    async def _ask(
        self, number: int, requests: Sequence[GenerateRequest], version: int
    ) -> list[tuple[Completion, ...]]:
        """A hand is repeated whole: its requests shared the engine's batches, and with them their
        last bits."""
        work = _work(requests)
        self._busy.add(number, work)
        try:
            return await self._persist(number, requests, version)
        finally:
            self._busy.add(number, -work)

    async def _persist(
        self, number: int, requests: Sequence[GenerateRequest], version: int
    ) -> list[tuple[Completion, ...]]:
        answer: list[tuple[Completion, ...]] = await self._engines[number].persist(
            lambda actor: actor.generate.remote(list(requests), version),
            phase="generate",
            timeout_s=self._timeout_s,
        )
        return answer

    async def update(self, snapshot: WeightSnapshot) -> None:
        await self._transport.deliver(snapshot)

    async def sleep(self) -> None:
        """Every engine gives its GPU up. Its weights stay in host memory unless they are in the
        object store anyway."""
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
        await asyncio.gather(
            *(
                engine.persist(call, phase=phase, timeout_s=self._timeout_s)
                for engine in self._engines
            )
        )


def _work(requests: Iterable[GenerateRequest]) -> int:
    """Sequences to write."""
    return sum(len(request.seeds) for request in requests)


RemoteRollout = ray.remote(RolloutActor)

"""The rollout role: vLLM engines in actors, and the pool that spreads requests over them.

In: requests for completions of one weight version, and weight snapshots. Out: completions.

Synchronization: `generate` waits for the engines that got its requests. A lost engine is replaced
and gets the requests of its pending calls again; with rollout.in_flight_updates others continue
them (actors/partials.py). `update` waits for every engine.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from actors.partials import ContinuedCalls
from actors.process import ReportsProcess
from actors.supervise import SupervisedActor
from actors.transport import Transport
from actors.watch import Call
from rayhf.config.models import ModelName
from rayhf.config.schema import Dtype, RolloutConfig
from rayhf.models.hub import local_directory, obtain
from rayhf.rollout.env import Device
from rayhf.rollout.partials import Growth, Partial, Slot
from rayhf.types import Completion, GenerateRequest, Probe, WeightSnapshot

if TYPE_CHECKING:
    from rayhf.rollout.engine import UpdateReport
    from rayhf.weights.broadcast import Rendezvous

Completions = tuple[Completion, ...]
"""Of one request, one per seed."""


class RolloutActor(ReportsProcess):
    """Ray actor around one RolloutEngine, whose process has the variables of `engine_env`."""

    def build(
        self,
        model: ModelName,
        config: RolloutConfig,
        *,
        dtype: Dtype,
        max_length: int,
        seed: int,
        device: Device,
        sleeps: bool = False,
        stop_token_ids: Sequence[int] = (),
        scaled_logprobs: bool = False,
        isolates_waves: bool = False,
    ) -> None:
        from rayhf.rollout.engine import RolloutEngine

        obtain(model)
        self.engine = RolloutEngine(
            local_directory(model),
            config,
            dtype=dtype,
            max_length=max_length,
            seed=seed,
            device=device,
            sleep_mode=sleeps,
            stop_token_ids=stop_token_ids,
            scaled_logprobs=scaled_logprobs,
            isolates_waves=isolates_waves,
        )

    async def generate(
        self,
        requests: Sequence[GenerateRequest],
        version: int,
        call: int | None = None,
        partials: Mapping[Slot, Partial] = MappingProxyType({}),
    ) -> list[Completions]:
        return await asyncio.wrap_future(
            self.engine.submit(requests, version=version, call=call, partials=partials)
        )

    async def report(self) -> list[Growth]:
        """Return what running calls generated since the last report."""
        return await asyncio.to_thread(self.engine.report)

    async def progress(self) -> int:
        """Return a count that grows with everything the engine does."""
        return self.engine.stats().progress

    async def join_broadcast(self, rendezvous: Rendezvous, first_rank: int) -> None:
        await asyncio.to_thread(self.engine.join_broadcast, rendezvous, first_rank)

    async def update(self, snapshot: WeightSnapshot, *payloads: Any) -> UpdateReport:
        return await asyncio.to_thread(self.engine.update, snapshot, payloads)

    async def verify(self, probe: Probe) -> None:
        await asyncio.to_thread(self.engine.verify, probe)

    async def sleep(self, keep_weights: bool) -> None:
        await asyncio.to_thread(self.engine.sleep, keep_weights=keep_weights)

    async def wake(self) -> None:
        await asyncio.to_thread(self.engine.wake)


class LeastLoaded:
    """Load of each of many engines, and the one with the least, without a look at all of them."""

    def __init__(self, engines: int) -> None:
        self._load = [0] * engines
        self._heap = [(0, number) for number in range(engines)]
        """Entries (load, engine). An outdated load does not count; every engine has an entry that
        does."""

    def least(self) -> int:
        """Return the smallest load."""
        while self._heap[0][0] != self._load[self._heap[0][1]]:
            heapq.heappop(self._heap)
        return self._heap[0][0]

    def choose(self) -> int:
        """Return the engine with the smallest load, the first of equals; `add` must follow."""
        self.least()
        return heapq.heappop(self._heap)[1]

    def of(self, engine: int) -> int:
        """Return the load of an engine."""
        return self._load[engine]

    def add(self, engine: int, work: int) -> None:
        self._load[engine] += work
        heapq.heappush(self._heap, (self._load[engine], engine))
        if len(self._heap) > 4 * len(self._load):
            self._heap = sorted((load, number) for number, load in enumerate(self._load))


_MAX_COALESCED = 8
"""Maximum number of single requests in one call."""
_SATURATED = 2
"""Load above which single requests are coalesced, in multiples of an engine's max_num_seqs."""


@dataclass(eq=False, slots=True)
class _Single:
    """A request that came alone and is sent together with others."""

    request: GenerateRequest
    version: int
    result: asyncio.Future[Completions]
    others: Sequence[_Single] = ()
    """Requests of the same call, this one included."""
    call: asyncio.Task[None] | None = None


class RolloutPool:
    """Rollout over one or more engines.

    An engine that is lost is replaced, and each of its pending calls is repeated as a whole: its
    requests shared the engine's batches, and with them their last bits. With `report_s` another
    engine continues them instead.

    A call costs the controller more than what is in it. A single request is a call of its own where
    an engine has room for it or soon will: its result must not wait for another's. Where every
    engine has so much work that a request would wait anyway, the requests of one turn of the event
    loop are coalesced, at most `_MAX_COALESCED` per call, and return together. No request is held
    back for that, so no engine idles; but up to half of what a call is counted for may be finished
    and wait for the rest, hence `_SATURATED`.

    Args:
        engines: the engines' actors.
        transport: way of new weights to the engines.
        max_num_seqs: sequences that one engine generates at a time.
        timeout_s: limit on every call; of `generate`, for every max_num_seqs sequences that the
            engine has to generate. Whether it makes progress at all is watched besides.
        report_s: seconds between reports of unfinished completions; None: calls are not continued.
    """

    def __init__(
        self,
        engines: Sequence[SupervisedActor],
        transport: Transport,
        *,
        max_num_seqs: int,
        timeout_s: float,
        report_s: float | None = None,
    ) -> None:
        self._engines = engines
        self._transport = transport
        self._timeout_s = timeout_s
        self._loads = LeastLoaded(len(engines))
        self._max_num_seqs = max_num_seqs
        self._saturated = _SATURATED * max_num_seqs
        self._singles: list[_Single] = []
        """Requests to be coalesced in this turn of the event loop."""
        self._continued = None if report_s is None else ContinuedCalls(engines, every_s=report_s)
        self.paused_s = 0.0
        """Longest time that an engine did not generate for the last update."""
        for engine in engines:
            engine.prepare = transport.join_engine

    async def generate(
        self, requests: Sequence[GenerateRequest], *, version: int
    ) -> list[Completions]:
        """Complete every request, in order.

        One request goes to the least loaded engine; several are dealt out in a fixed order, so that
        equal calls are dealt equally.
        """
        if len(requests) == 1:
            if self._loads.least() >= self._saturated:
                return [await self._coalesce(requests[0], version)]
            return await self._generate(self._loads.choose(), requests, version)
        count = len(self._engines)
        shares = [requests[i::count] for i in range(min(count, len(requests)))]
        answers = await asyncio.gather(
            *(self._generate(i, share, version) for i, share in enumerate(shares))
        )
        results: list[Completions] = [()] * len(requests)
        for i, completions in enumerate(answers):
            results[i::count] = completions
        return results

    async def _generate(
        self, engine: int, requests: Sequence[GenerateRequest], version: int
    ) -> list[Completions]:
        work = _work(requests)
        self._loads.add(engine, work)
        try:
            return await self._call(engine, requests, version)
        finally:
            self._loads.add(engine, -work)

    async def _call(
        self, engine: int, requests: Sequence[GenerateRequest], version: int
    ) -> list[Completions]:
        results: list[Completions]
        timeout_s = self._timeout_s * math.ceil(self._loads.of(engine) / self._max_num_seqs)
        if self._continued is not None:
            results = await self._continued.generate(engine, requests, version, timeout_s=timeout_s)
            return results
        results = await self._engines[engine].persist(
            lambda actor: actor.generate.remote(list(requests), version),
            phase="generate",
            timeout_s=timeout_s,
        )
        return results

    # ------------------------------------------------------------------------------ coalescing

    async def _coalesce(self, request: GenerateRequest, version: int) -> Completions:
        """Return the result of one request that is sent together with others."""
        loop = asyncio.get_running_loop()
        single = _Single(request, version, loop.create_future())
        if not self._singles:
            loop.call_soon(self._send_singles)  # after all tasks that woke in this turn
        self._singles.append(single)
        try:
            return await single.result
        except asyncio.CancelledError:
            if single.call is not None and all(other.result.cancelled() for other in single.others):
                single.call.cancel()  # no request of the call is waited for any more
            raise

    def _send_singles(self) -> None:
        """Send the collected requests, by version, each call to the engine with the least load."""
        singles = self._singles
        self._singles = []
        for version in dict.fromkeys(single.version for single in singles):
            waiting = [
                single
                for single in singles
                if single.version == version and not single.result.done()
            ]
            for start in range(0, len(waiting), _MAX_COALESCED):
                together = waiting[start : start + _MAX_COALESCED]
                work = _work(single.request for single in together)
                engine = self._loads.choose()
                self._loads.add(engine, work)
                call = asyncio.create_task(self._call_singles(engine, together, version, work))
                for single in together:
                    single.others = together
                    single.call = call

    async def _call_singles(
        self, engine: int, singles: Sequence[_Single], version: int, work: int
    ) -> None:
        """Call an engine, and pass its results or its error on to each request."""
        try:
            results = await self._call(engine, [single.request for single in singles], version)
        except Exception as error:  # noqa: BLE001  passed on to the requests
            for single in singles:
                if not single.result.done():
                    single.result.set_exception(error)
        else:
            for single, completions in zip(singles, results, strict=True):
                if not single.result.done():  # the request may have been canceled
                    single.result.set_result(completions)
        finally:
            self._loads.add(engine, -work)
            for single in singles:
                # Cycles would keep the results alive until the garbage collector runs.
                single.others = ()
                single.call = None

    # ---------------------------------------------------------------------- weights and memory

    async def update(self, snapshot: WeightSnapshot) -> None:
        reports = await self._transport.deliver(snapshot)
        self.paused_s = max(report.seconds for report in reports)

    async def verify(self, probe: Probe) -> None:
        await self._all("probe", lambda actor: actor.verify.remote(probe))

    async def sleep(self) -> None:
        """Free every engine's GPU; keep its weights in host memory unless they are stored."""
        keep = self._transport.stored is None
        await self._all("sleep", lambda actor: actor.sleep.remote(keep))

    async def wake(self) -> None:
        """Let every engine generate again, with the weights that it had."""
        stored = self._transport.stored
        if stored is None:
            await self._all("wake", lambda actor: actor.wake.remote())
        else:
            await self._all("wake", stored.update)

    async def _all(self, phase: str, call: Call) -> None:
        await asyncio.gather(
            *(
                engine.persist(call, phase=phase, timeout_s=self._timeout_s)
                for engine in self._engines
            )
        )


def _work(requests: Iterable[GenerateRequest]) -> int:
    """Return the number of sequences to generate."""
    return sum(len(request.seeds) for request in requests)

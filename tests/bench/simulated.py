"""Simulated roles for virtual time: durations and failures are drawn, results have realistic sizes.

The engines take the place of Ray actors behind the real RolloutPool and supervision. All randomness
derives from a request's seeds or from an engine's number, so that simulations are reproducible. The
computation of the simulated roles is measured separately (`Meter`) and does not count as the
controller's.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.process import ProcessInfo
from actors.rollout import RolloutPool
from actors.supervise import SupervisedActor, SupervisionLimits
from actors.transport import ObjectStore
from rayhf.errors import StaleWeightsError
from rayhf.rollout.engine import ProbeGap, UpdateReport
from rayhf.types import (
    Completion,
    Failed,
    Invalid,
    Probe,
    Scored,
    WeightBucket,
    WeightSnapshot,
    derive_seed,
    float_array,
    token_array,
)

_NORMAL = statistics.NormalDist()
_POOL = np.random.default_rng(0).integers(1000, 150_000, 1 << 20)
"""Token ids to slice completions from: large ints, which Python does not share, and random, so that
they compress like real ones."""
_LOGPROBS = -np.random.default_rng(1).exponential(size=1 << 20).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class World:
    """Parameters of the simulated roles; times in seconds."""

    engines: int
    slots: int = 64
    """Sequences that one engine generates at the same time; more are queued."""
    tokens: int = 32
    """Mean length of a completion."""
    sequence_s: float = 20.0
    """Mean time to generate one."""
    spread: float = 0.5
    """Standard deviation of its logarithm."""
    stragglers: float = 0.002
    """Share of sequences that take `slower` times as long."""
    slower: float = 5.0
    life_s: float = 36_000.0
    """Mean time between two failures of one engine."""
    restart_s: float = 60.0
    score_s: float = 0.05
    """Per call of the scorer."""
    score_each_s: float = 2e-5
    """Per completion."""
    unreachable: float = 0.001
    """Share of completions whose scoring must be retried."""
    invalid: float = 0.001
    """Share of completions without a score."""
    step_s: float = 2.0
    """Per optimizer step; log-probs of the same rows take half as long."""
    sync_s: float = 5.0
    seed: int = 0

    def draw_s(self, seed: int) -> float:
        """Return how long one sequence takes."""
        z = _NORMAL.inv_cdf((seed + 0.5) / 2**63)
        straggler = seed % 9973 < 9973 * self.stragglers
        return (
            self.sequence_s
            * math.exp(self.spread * z - self.spread**2 / 2)
            * (self.slower if straggler else 1.0)
        )


@dataclass
class Meter:
    """Counts of the simulated roles, and the CPU time spent on simulating and measuring."""

    cpu_s: float = 0.0
    """CPU seconds of simulating."""
    simulated_s: float = 0.0
    """The same in wall-clock seconds, which are cheaper to read."""
    simulations: int = 0
    """Number of measured intervals."""
    gc_s: float = 0.0
    generated_s: float = 0.0
    """Virtual seconds of all finished sequences, summed."""
    longest_s: float = 0.0
    calls: int = 0
    failures: int = 0
    """Crashes of engines with work in progress."""
    busy_at_update: int = 0
    _gc_started: float = field(default=0.0, repr=False)

    def clock(self) -> float:
        """Return the CPU seconds of this thread."""
        return time.thread_time()

    def worked(self) -> float:
        """Return the seconds so far without those of simulating."""
        return time.perf_counter() - self.simulated_s

    def measuring_s(self) -> float:
        """Return the CPU seconds of measuring itself, beyond those in `cpu_s`."""
        empty = Meter()
        turns = 20_000
        started = time.thread_time()
        for _ in range(turns):
            with empty.simulating():
                pass
        return self.simulations * (time.thread_time() - started - empty.cpu_s) / turns

    @contextmanager
    def simulating(self) -> Iterator[None]:
        self.simulations += 1
        began = time.perf_counter()
        started = self.clock()
        gc_before = self.gc_s
        try:
            yield
        finally:
            # Garbage collection traverses the controller's objects, too: it is not simulating.
            self.cpu_s += self.clock() - started - (self.gc_s - gc_before)
            self.simulated_s += time.perf_counter() - began

    def watch_collector(self) -> None:
        gc.callbacks.append(self._collector)

    def _collector(self, phase: str, facts: dict[str, int]) -> None:
        now = self.clock()
        if phase == "start":
            self._gc_started = now
        else:
            self.gc_s += now - self._gc_started


class Call:
    """The reference that Ray returns for a call.

    Ray's own work and the way from its threads to the loop are measured by ray_calls.py.
    """

    def __init__(self) -> None:
        self.result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def future(self) -> asyncio.Future[Any]:
        return self.result


@dataclass(frozen=True)
class Method:
    """The method of an actor handle: `actor.name.remote(...)`."""

    remote: Callable[..., Call]


class Engine:
    """The handle of a rollout actor from its start to its crash.

    Sequences take slots in the order of their arrival.
    """

    def __init__(self, number: int, life: int, world: World, meter: Meter) -> None:
        self.world = world
        self.meter = meter
        self.version = 0
        self.steps = 0
        self.dead = False
        self._free = [0.0] * world.slots
        self._in_flight: dict[Call, asyncio.TimerHandle | None] = {}
        self._due: list[tuple[float, int, Call, list[Any], list[float]]] = []
        """A heap of the sequences in progress, by when they finish. They share one timer, so that
        the loop's own heap stays as small as with real engines."""
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self.generate = Method(self._generate)
        self.update = Method(self._update)
        self.verify = Method(lambda probe: self._respond(None))
        self.progress = Method(self._progress)
        self.process_info = Method(lambda: self._respond(ProcessInfo("nowhere", 0, 0.0)))
        life_s = random.Random(derive_seed(world.seed, "life", number, life)).expovariate(
            1 / world.life_s
        )
        self._end = self._loop.call_later(life_s, self._crash)

    def _respond(self, response: Any, after: float = 0.001) -> Call:
        call = Call()
        self._in_flight[call] = self._loop.call_later(after, self._deliver, call, response)
        return call

    def _deliver(self, call: Call, response: Any) -> None:
        del self._in_flight[call]
        if not call.result.done():  # the caller may have canceled it
            call.result.set_result(response)

    def _crash(self) -> None:
        self.dead = True
        if self._in_flight:
            self.meter.failures += 1
        for call, timer in self._in_flight.items():
            if timer is not None:
                timer.cancel()
            if not call.result.done():
                call.result.set_exception(ray.exceptions.ActorDiedError())
        self._in_flight.clear()
        self._due.clear()

    def _lost(self) -> Call:
        call = Call()
        call.result.set_exception(ray.exceptions.ActorDiedError())
        return call

    def _generate(self, requests: list[Any], version: int) -> Call:
        if self.dead:
            return self._lost()
        with self.meter.simulating():
            self.meter.calls += 1
            call = Call()
            if version != self.version:
                call.result.set_exception(
                    StaleWeightsError(f"requested {version}, this engine holds {self.version}")
                )
                return call
            now = self._loop.time()
            end = now
            seconds = [self.world.draw_s(seed) for request in requests for seed in request.seeds]
            for each in seconds:
                finished = max(now, heapq.heappop(self._free)) + each
                heapq.heappush(self._free, finished)
                end = max(end, finished)
            self._in_flight[call] = None
            heapq.heappush(self._due, (end, self.meter.calls, call, requests, seconds))
            self._rearm()
            return call

    def _rearm(self) -> None:
        """Set the timer to the next finished call."""
        if self._timer is not None and (not self._due or self._timer.when() != self._due[0][0]):
            self._timer.cancel()
            self._timer = None
        if self._timer is None and self._due:
            self._timer = self._loop.call_at(self._due[0][0], self._finish)

    def _finish(self) -> None:
        done: list[tuple[Call, Any]] = []
        with self.meter.simulating():
            self._timer = None
            while self._due and self._due[0][0] <= self._loop.time():
                _, _, call, requests, seconds = heapq.heappop(self._due)
                self.steps += 1
                self.meter.generated_s += sum(seconds)
                self.meter.longest_s = max(self.meter.longest_s, *seconds)
                completions = [
                    tuple(self._complete(r, i, seed) for i, seed in enumerate(r.seeds))
                    for r in requests
                ]
                done.append((call, completions))
            self._rearm()
        for call, completions in done:
            self._deliver(call, completions)

    def _complete(self, request: Any, index: int, seed: int) -> Completion:
        length = 1 + seed % (2 * self.world.tokens - 1)
        start = (seed >> 7) % (len(_POOL) - length)
        return Completion(
            prompt_id=request.prompt_id,
            index=index,
            seed=seed,
            text=(f"{seed:x} four letters a token" * (length // 8 + 1))[: 4 * length],
            token_ids=token_array(_POOL[start : start + length].astype(np.int32)),
            logprobs=float_array(_LOGPROBS[start : start + length].copy()),
            finish_reason="stop",
            policy_version=self.version,
        )

    def _progress(self) -> Call:
        self.steps += 1
        return self._lost() if self.dead else self._respond(self.steps)

    def _update(self, snapshot: WeightSnapshot, *payloads: Any) -> Call:
        if self.dead:
            return self._lost()
        self.meter.busy_at_update += bool(self._in_flight)
        self.version = snapshot.version
        report = UpdateReport(
            version=snapshot.version,
            checksum=snapshot.checksum,
            gap=ProbeGap(mean=0.0, max=0.0),
            seconds=self.world.sync_s,
        )
        return self._respond(report, self.world.sync_s)


async def no_process(
    actor: Any, process: ProcessInfo | None, *, graceful: bool, stacks: Path | None
) -> None:
    """Terminate nothing: the engines have no processes."""


async def engines(world: World, meter: Meter) -> RolloutPool:
    """Start the real pool over `world.engines` engines."""
    starts = [0] * world.engines

    def create(number: int) -> Engine:
        starts[number] += 1
        return Engine(number, starts[number], world, meter)

    async def build(actor: Any) -> None:
        await asyncio.sleep(world.restart_s)

    limits = SupervisionLimits(stall_s=300.0, restarts=1_000)
    actors = [
        SupervisedActor(
            f"rollout engine {i}", partial(create, i), build, limits=limits, terminate=no_process
        )
        for i in range(world.engines)
    ]
    await asyncio.gather(*(actor.start() for actor in actors))
    transport = ObjectStore(actors, timeout_s=1e6)
    return RolloutPool(actors, transport, max_num_seqs=world.slots, timeout_s=1e6)


class SimScorer:
    """A scorer whose scores follow from a completion's seed."""

    def __init__(self, world: World, meter: Meter) -> None:
        self.world = world
        self.meter = meter
        self._calls = 0

    async def score(self, requests: Any) -> list[Any]:
        with self.meter.simulating():
            outcomes = [tuple(self._judge(c) for c in request.completions) for request in requests]
        count = sum(len(row) for row in outcomes)
        await asyncio.sleep(self.world.score_s + self.world.score_each_s * count)
        return outcomes

    def _judge(self, completion: Completion) -> Any:
        chance = (completion.seed >> 20) % 100_003 / 100_003
        self._calls += 1
        # By the number of the call, so that a retry succeeds.
        if self._calls * 7919 % 100_003 < 100_003 * self.world.unreachable:
            return Failed(reason="not reached", transient=True)
        return Invalid(reason="no number") if chance < self.world.invalid else Scored(value=chance)

    async def compare(self, requests: Any) -> list[Any]:
        raise NotImplementedError

    async def state_dict(self) -> dict[str, Any]:
        return {"mean": 0.5, "seen": self._calls}

    async def load_state_dict(self, state: Any) -> None:
        self._calls = state["seen"]


class SimLearner:
    """A learner with a fixed time per step; also the reference."""

    def __init__(self, world: World, meter: Meter, rows_per_step: int) -> None:
        self.world = world
        self.meter = meter
        self._rows_per_step = rows_per_step
        self.steps = 0

    async def step(self, batch: Any, loss: Any) -> dict[str, float]:
        await asyncio.sleep(self.world.step_s)
        self.steps += 1
        return {"learner/loss": 0.7, "learner/grad_norm": 1.0, "learner/entropy": 2.0}

    async def outputs(self, rows: Any, *, temperature: float, progress: Any = None) -> list[Any]:
        with self.meter.simulating():
            values = [np.zeros(len(row.response_ids), dtype=np.float32) for row in rows]
        await asyncio.sleep(self.world.step_s / 2 * len(rows) / self._rows_per_step)
        return values

    async def logprobs(self, rows: Any, *, temperature: float, model: Any = None) -> list[Any]:
        return await self.outputs(rows, temperature=temperature)

    async def top_logprobs(self, rows: Any, *, temperature: float, top_k: int) -> list[Any]:
        raise NotImplementedError("no case distills")

    async def probe(self) -> Probe:
        return Probe(token_ids=(), logprobs=())

    async def publish(self, version: int, *, stored: bool = False) -> WeightSnapshot:
        await asyncio.sleep(self.world.sync_s)
        buckets = tuple(WeightBucket(tensors=(), payload=None, checksum="") for _ in range(8))
        return WeightSnapshot(
            version=version, buckets=buckets, checksum="", probe=Probe(token_ids=(), logprobs=())
        )

    async def sync_metrics(self) -> dict[str, float]:
        return {}

    async def save(self, directory: Any) -> None:
        directory.mkdir(parents=True)
        (directory / "steps").write_text(str(self.steps))

    async def load(self, directory: Any) -> None:
        self.steps = int((directory / "steps").read_text())

    async def export(self, directory: Any) -> None:
        (directory / "config.json").write_text("{}")

    async def update(self, snapshot: WeightSnapshot, *, mix: float) -> None:
        await asyncio.sleep(self.world.sync_s)

"""Roles for a simulation in virtual time: how long answers take and what fails is drawn, the
answers are as large as real ones.

The engines stand where Ray's actors stand, behind the real RolloutPool and the real supervision.
Everything that is drawn derives from a request's own seeds or from an engine's number, so that a
simulation can be repeated. What the roles themselves compute is measured apart (`Meter`), so that
it does not count as the controller's work.
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
from typing import Any

import numpy as np
import ray

from actors.rollout import RolloutPool
from actors.supervise import SupervisedActor, SupervisionLimits
from actors.process import ProcessInfo
from actors.transport import ObjectStore
from rayhf.errors import StaleWeightsError
from rayhf.types import (
    Completion,
    Failed,
    Invalid,
    Probe,
    Scored,
    WeightBucket,
    WeightSnapshot,
    derive_seed,
)

_NORMAL = statistics.NormalDist()
_POOL = np.random.default_rng(0).integers(1000, 150_000, 1 << 20)
"""Token ids to cut answers from: large ones, which Python does not share, and not compressible
beyond what real ones are."""
_LOGPROBS = -np.random.default_rng(1).exponential(size=1 << 20).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class World:
    """What the roles are like. Times in seconds."""

    engines: int
    slots: int = 64
    """Sequences that one engine writes at the same time; more wait."""
    tokens: int = 32
    """Mean length of a completion."""
    sequence_s: float = 20.0
    """Mean time to write one."""
    spread: float = 0.5
    """Standard deviation of its logarithm."""
    stragglers: float = 0.002
    """Share of sequences that take `slower` times as long."""
    slower: float = 5.0
    life_s: float = 36_000.0
    """Mean time between two failures of one engine."""
    restart_s: float = 60.0
    score_s: float = 0.05
    """Of one scorer call, and per completion below."""
    score_each_s: float = 2e-5
    unreachable: float = 0.001
    """Share of completions that the scorer must be asked for again."""
    invalid: float = 0.001
    """Share of completions without a score."""
    step_s: float = 2.0
    """Of one optimizer step; log-probs of the same rows take half as long."""
    sync_s: float = 5.0
    seed: int = 0

    def draw_s(self, seed: int) -> float:
        """How long one sequence takes."""
        z = _NORMAL.inv_cdf((seed + 0.5) / 2**63)
        straggler = seed % 9973 < 9973 * self.stragglers
        return (
            self.sequence_s
            * math.exp(self.spread * z - self.spread**2 / 2)
            * (self.slower if straggler else 1.0)
        )


@dataclass
class Meter:
    """What the roles did, and the processor time that this process spent on playing them and on
    measuring."""

    cpu_s: float = 0.0
    """Of playing."""
    played_s: float = 0.0
    """The same on the wall's clock, which costs less to look at."""
    played: int = 0
    """How many times."""
    gc_s: float = 0.0
    written_s: float = 0.0
    """Of sequences that were written to their end, end to end."""
    longest_s: float = 0.0
    asked: int = 0
    failures: int = 0
    """Of engines."""
    busy_at_update: int = 0
    _collecting: float = field(default=0.0, repr=False)

    def clock(self) -> float:
        """Processor seconds of this thread."""
        return time.thread_time()

    def worked(self) -> float:
        """Seconds of work without the playing."""
        return time.perf_counter() - self.played_s

    def measuring_s(self) -> float:
        """What all the metering cost, beyond what was booked as playing."""
        empty, turns = Meter(), 20_000
        started = time.thread_time()
        for _ in range(turns):
            with empty.playing():
                pass
        return self.played * (time.thread_time() - started - empty.cpu_s) / turns

    @contextmanager
    def playing(self) -> Iterator[None]:
        self.played += 1
        began, started, collected = time.perf_counter(), self.clock(), self.gc_s
        try:
            yield
        finally:  # the garbage collector looks through everything, whoever happens to call it
            self.cpu_s += self.clock() - started - (self.gc_s - collected)
            self.played_s += time.perf_counter() - began

    def watch_collector(self) -> None:
        gc.callbacks.append(self._collector)

    def _collector(self, phase: str, facts: dict[str, int]) -> None:
        now = self.clock()
        if phase == "start":
            self._collecting = now
        else:
            self.gc_s += now - self._collecting


class Call:
    """What Ray gives for a call. Ray's own work for it, and the way from its threads to the loop,
    are not part of this: see ray_calls.py."""

    def __init__(self) -> None:
        self.result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def future(self) -> asyncio.Future[Any]:
        return self.result


@dataclass(frozen=True)
class Method:
    """`actor.name.remote(...)`."""

    remote: Callable[..., Call]


class Engine:
    """One life of a rollout actor, as a handle: sequences take the slots in the order in which they
    come."""

    def __init__(self, number: int, life: int, world: World, meter: Meter) -> None:
        self.world, self.meter = world, meter
        self.version, self.steps, self.dead = 0, 0, False
        self._free = [0.0] * world.slots
        self._under_way: dict[Call, asyncio.TimerHandle | None] = {}
        self._due: list[tuple[float, int, Call, list[Any], list[float]]] = []
        """A heap of what is being written, by when it will be done. One timer for all: the loop's
        heap is the controller's."""
        self._alarm: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self.generate, self.update = Method(self._generate), Method(self._update)
        self.progress, self.process_info = (
            Method(self._progress),
            Method(lambda: self._soon(ProcessInfo("nowhere", 0, 0.0))),
        )
        life_s = random.Random(derive_seed(world.seed, "life", number, life)).expovariate(
            1 / world.life_s
        )
        self._end = self._loop.call_later(life_s, self._die)

    def _soon(self, answer: Any, after: float = 0.001) -> Call:
        call = Call()
        self._under_way[call] = self._loop.call_later(after, self._answer, call, answer)
        return call

    def _answer(self, call: Call, answer: Any) -> None:
        del self._under_way[call]
        if not call.result.done():  # whoever asked may have given up
            call.result.set_result(answer)

    def _die(self) -> None:
        self.dead = True
        if self._under_way:
            self.meter.failures += 1
        for call, timer in self._under_way.items():
            if timer is not None:
                timer.cancel()
            if not call.result.done():
                call.result.set_exception(ray.exceptions.ActorDiedError())
        self._under_way.clear()
        self._due.clear()

    def _lost(self) -> Call:
        call = Call()
        call.result.set_exception(ray.exceptions.ActorDiedError())
        return call

    def _generate(self, requests: list[Any], version: int) -> Call:
        if self.dead:
            return self._lost()
        with self.meter.playing():
            self.meter.asked += 1
            call = Call()
            if version != self.version:
                call.result.set_exception(
                    StaleWeightsError(f"asked for {version}, this engine holds {self.version}")
                )
                return call
            now = end = self._loop.time()
            seconds = [self.world.draw_s(seed) for request in requests for seed in request.seeds]
            for each in seconds:
                finished = max(now, heapq.heappop(self._free)) + each
                heapq.heappush(self._free, finished)
                end = max(end, finished)
            self._under_way[call] = None
            heapq.heappush(self._due, (end, self.meter.asked, call, requests, seconds))
            self._rearm()
            return call

    def _rearm(self) -> None:
        """Ring when the next answer is done."""
        if self._alarm is not None and (not self._due or self._alarm.when() != self._due[0][0]):
            self._alarm.cancel()
            self._alarm = None
        if self._alarm is None and self._due:
            self._alarm = self._loop.call_at(self._due[0][0], self._write)

    def _write(self) -> None:
        done: list[tuple[Call, Any]] = []
        with self.meter.playing():
            self._alarm = None
            while self._due and self._due[0][0] <= self._loop.time():
                _, _, call, requests, seconds = heapq.heappop(self._due)
                self.steps += 1
                self.meter.written_s += sum(seconds)
                self.meter.longest_s = max(self.meter.longest_s, *seconds)
                answers = [
                    tuple(self._complete(r, i, seed) for i, seed in enumerate(r.seeds))
                    for r in requests
                ]
                done.append((call, answers))
            self._rearm()
        for call, answers in done:
            self._answer(call, answers)

    def _complete(self, request: Any, index: int, seed: int) -> Completion:
        length = 1 + seed % (2 * self.world.tokens - 1)
        place = (seed >> 7) % (len(_POOL) - length)
        return Completion(
            prompt_id=request.prompt_id,
            index=index,
            seed=seed,
            text=f"{seed:x} four letters a token"[: 4 * length] * max(1, length // 7),
            token_ids=tuple(_POOL[place : place + length].tolist()),
            logprobs=tuple(_LOGPROBS[place : place + length].tolist()),
            finish_reason="stop",
            policy_version=self.version,
        )

    def _progress(self) -> Call:
        self.steps += 1
        return self._lost() if self.dead else self._soon(self.steps)

    def _update(self, snapshot: WeightSnapshot, *payloads: Any) -> Call:
        if self.dead:
            return self._lost()
        self.meter.busy_at_update += bool(self._under_way)
        self.version = snapshot.version
        return self._soon(None, self.world.sync_s)


async def no_process(actor: Any, process: Any, *, graceful: bool, stacks: Any) -> None:
    """Nothing to terminate: the engines have no processes."""


async def engines(world: World, meter: Meter) -> RolloutPool:
    """The real pool over `world.engines` engines."""
    lives = [0] * world.engines

    def create(number: int) -> Engine:
        lives[number] += 1
        return Engine(number, lives[number], world, meter)

    async def built(actor: Any) -> None:
        await asyncio.sleep(world.restart_s)

    limits = SupervisionLimits(stall_s=300.0, restarts=1_000)
    members = [
        SupervisedActor(
            f"rollout engine {i}", partial(create, i), built, limits=limits, terminate=no_process
        )
        for i in range(world.engines)
    ]
    await asyncio.gather(*(one.start() for one in members))
    transport = ObjectStore(members, timeout_s=1e6)
    return RolloutPool(members, transport, max_num_seqs=world.slots, timeout_s=1e6)


class SimScorer:
    """Scores follow from a completion's seed."""

    def __init__(self, world: World, meter: Meter) -> None:
        self.world, self.meter = world, meter
        self._asked = 0

    async def score(self, requests: Any) -> list[Any]:
        with self.meter.playing():
            answers = [tuple(self._judge(c) for c in request.completions) for request in requests]
        await asyncio.sleep(
            self.world.score_s + self.world.score_each_s * sum(len(a) for a in answers)
        )
        return answers

    def _judge(self, completion: Completion) -> Any:
        chance = (completion.seed >> 20) % 100_003 / 100_003
        self._asked += 1
        if (
            self._asked * 7919 % 100_003 < 100_003 * self.world.unreachable
        ):  # by turns: asked again it is another turn
            return Failed(reason="not reached", transient=True)
        return Invalid(reason="no number") if chance < self.world.invalid else Scored(value=chance)

    async def compare(self, requests: Any) -> list[Any]:
        raise NotImplementedError

    async def state_dict(self) -> dict[str, Any]:
        return {"mean": 0.5, "seen": self._asked}

    async def load_state_dict(self, state: Any) -> None:
        self._asked = state["seen"]


class SimLearner:
    """A fixed time per step. Also the reference: both answer with one number per response token."""

    def __init__(self, world: World, meter: Meter, rows_per_step: int) -> None:
        self.world, self.meter, self._rows_per_step = world, meter, rows_per_step
        self.steps = 0

    async def step(self, batch: Any, loss: Any) -> dict[str, float]:
        await asyncio.sleep(self.world.step_s)
        self.steps += 1
        return {"learner/loss": 0.7, "learner/grad_norm": 1.0, "learner/entropy": 2.0}

    async def outputs(self, rows: Any, *, temperature: float) -> list[Any]:
        with self.meter.playing():
            answers = [np.zeros(len(row.response_ids), dtype=np.float32) for row in rows]
        await asyncio.sleep(self.world.step_s / 2 * len(rows) / self._rows_per_step)
        return answers

    async def logprobs(self, rows: Any, *, temperature: float) -> list[Any]:
        return await self.outputs(rows, temperature=temperature)

    async def publish(self, version: int, *, stored: bool = False) -> WeightSnapshot:
        await asyncio.sleep(self.world.sync_s)
        buckets = tuple(WeightBucket(tensors=(), payload=None, checksum="") for _ in range(8))
        return WeightSnapshot(
            version=version, buckets=buckets, checksum="", probe=Probe(token_ids=(), logprobs=())
        )

    async def save(self, directory: Any) -> None:
        directory.mkdir(parents=True)
        (directory / "steps").write_text(str(self.steps))

    async def load(self, directory: Any) -> None:
        self.steps = int((directory / "steps").read_text())

    async def export(self, directory: Any) -> None:
        (directory / "config.json").write_text("{}")

    async def update(self, snapshot: WeightSnapshot, *, mix: float) -> None:
        await asyncio.sleep(self.world.sync_s)

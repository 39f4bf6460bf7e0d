"""Time-sharing of GPUs between engines and learners; each role looks as if its GPUs were its own.

For learners: every engine sleeps (its weights stay in host memory only where the object store has
none), then every learner's state comes back from host memory -> log-probs, steps, publish,
checkpoint. For engines: every learner's state goes to host memory, then an engine allocates its
weights, loads them (new ones in an update), allocates its key-value cache -> generate.

Synchronization: a call waits until its side owns the GPUs, which happens when no call of the other
side is running. When a change of owner fails, no side owns them, and the next call makes the whole
change again: sleep and wake can be repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, Protocol

from rayhf.losses.base import Loss
from rayhf.roles import Learner, Progress, Rollout, no_progress
from rayhf.types import Batch, Completion, FloatArray, GenerateRequest, Probe, Row, WeightSnapshot


class SupportsSleep(Protocol):
    """A role that can free its GPUs and take them again."""

    async def sleep(self) -> None:
        """Free the GPUs; do nothing where they are free."""
        ...

    async def wake(self) -> None: ...


class SleepingRollout(Rollout, SupportsSleep, Protocol):
    """Rollout that supports sleep."""


class SleepingLearner(Learner, SupportsSleep, Protocol):
    """Learner that supports sleep."""


class GpuTimeSharing:
    """Owner of the shared GPUs at a time. Starts with the learners, every engine asleep."""

    def __init__(
        self, engines: Sequence[SleepingRollout], learners: Sequence[SleepingLearner]
    ) -> None:
        self._engines = engines
        self._learners = learners
        self._owner: Literal["rollout", "learner"] | None = "learner"
        self._awake: set[int] = set()
        """Ids of the engines that woke since their side owns the GPUs: each at its first call."""
        self._calls = 0
        """Calls that are running."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._changing = asyncio.Lock()

    @asynccontextmanager
    async def rollout(
        self, engine: SleepingRollout, wake: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[None]:
        """Let an engine run.

        `wake` wakes it other than with the weights that it had, and is called in any case.
        """
        async with self._changing:
            if self._owner != "rollout":
                await self._idle.wait()
                self._owner = None
                await asyncio.gather(*(learner.sleep() for learner in self._learners))
                self._owner = "rollout"
                self._awake.clear()
            if wake is not None or id(engine) not in self._awake:
                await (wake or engine.wake)()
                self._awake.add(id(engine))
            self._begin()
        try:
            yield
        finally:
            self._end()

    @asynccontextmanager
    async def learner(self) -> AsyncIterator[None]:
        """Let the learners run."""
        async with self._changing:
            if self._owner != "learner":
                await self._idle.wait()
                self._owner = None
                await asyncio.gather(*(engine.sleep() for engine in self._engines))
                await asyncio.gather(*(learner.wake() for learner in self._learners))
                self._owner = "learner"
            self._begin()
        try:
            yield
        finally:
            self._end()

    def _begin(self) -> None:
        self._calls += 1
        self._idle.clear()

    def _end(self) -> None:
        self._calls -= 1
        if not self._calls:
            self._idle.set()


class SharedRollout:
    """Rollout whose engines share their GPUs with learners."""

    def __init__(self, pool: SleepingRollout, gpus: GpuTimeSharing) -> None:
        self._pool = pool
        self._gpus = gpus

    async def generate(
        self, requests: Sequence[GenerateRequest], *, version: int
    ) -> list[tuple[Completion, ...]]:
        async with self._gpus.rollout(self._pool):
            return await self._pool.generate(requests, version=version)

    async def verify(self, probe: Probe) -> None:
        async with self._gpus.rollout(self._pool):
            await self._pool.verify(probe)

    async def update(self, snapshot: WeightSnapshot) -> None:
        async with self._gpus.rollout(self._pool, wake=lambda: self._pool.update(snapshot)):
            return


class SharedLearner:
    """Learner whose ranks share their GPUs with engines."""

    def __init__(self, client: SleepingLearner, gpus: GpuTimeSharing) -> None:
        self._client = client
        self._gpus = gpus

    async def step(self, batch: Batch, loss: Loss) -> dict[str, float]:
        async with self._gpus.learner():
            return await self._client.step(batch, loss)

    async def outputs(
        self, rows: Sequence[Row], *, temperature: float, progress: Progress = no_progress
    ) -> list[FloatArray]:
        async with self._gpus.learner():
            return await self._client.outputs(rows, temperature=temperature, progress=progress)

    async def probe(self) -> Probe:
        async with self._gpus.learner():
            return await self._client.probe()

    async def publish(self, version: int, *, stored: bool = False) -> WeightSnapshot:
        async with self._gpus.learner():
            return await self._client.publish(version, stored=stored)

    async def sync_metrics(self) -> dict[str, float]:
        return await self._client.sync_metrics()

    async def save(self, directory: Path) -> None:
        async with self._gpus.learner():
            await self._client.save(directory)

    async def load(self, directory: Path) -> None:
        async with self._gpus.learner():
            await self._client.load(directory)

    async def export(self, directory: Path) -> None:
        async with self._gpus.learner():
            await self._client.export(directory)

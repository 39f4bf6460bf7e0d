"""Engines and learners that share their GPUs take turns; the roles look as if they had them for
themselves.

A learner's turn: every engine sleeps (weights stay in host memory only where the object store has
not got them), then every learner's state comes back from host memory -> log-probs, steps, publish,
checkpoint. An engine's turn: every learner's state goes to host memory, then an engine takes memory
for its weights, the weights (new ones where it is an update), and memory for keys and values ->
generate.

Who waits for whom: a caller waits for its side's turn, which comes when nobody of the other side is
at work. A change that fails leaves the turn to nobody, and the next caller makes it again from the
start: putting to sleep and waking can be repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, Protocol

from rayhf.losses.base import Loss
from rayhf.roles import Learner, Rollout
from rayhf.types import Batch, Completion, FloatArray, GenerateRequest, Row, WeightSnapshot


class Sleeper(Protocol):
    async def sleep(self) -> None:
        """Give the GPUs up; nothing where that is done."""
        ...

    async def wake(self) -> None: ...


class SleepingRollout(Rollout, Sleeper, Protocol): ...


class SleepingLearner(Learner, Sleeper, Protocol): ...


class GpuTimeSharing:
    """Whose turn it is on the shared GPUs. It begins with the learners', every engine asleep."""

    def __init__(
        self, engines: Sequence[SleepingRollout], learners: Sequence[SleepingLearner]
    ) -> None:
        self._engines, self._learners = engines, learners
        self._turn: Literal["rollout", "learner"] | None = "learner"
        self._awake: set[int] = set()
        """Which engines woke in this turn, by id: the first call of each does it."""
        self._at_work = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._change = asyncio.Lock()

    @asynccontextmanager
    async def rollout(
        self, engine: SleepingRollout, wake: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[None]:
        """The engine may write. `wake` wakes it in another way than with its old weights, and is
        called in any case."""
        async with self._change:
            if self._turn != "rollout":
                await self._idle.wait()
                self._turn = None
                await asyncio.gather(*(learner.sleep() for learner in self._learners))
                self._turn = "rollout"
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
        """Every learner may learn."""
        async with self._change:
            if self._turn != "learner":
                await self._idle.wait()
                self._turn = None
                await asyncio.gather(*(engine.sleep() for engine in self._engines))
                await asyncio.gather(*(learner.wake() for learner in self._learners))
                self._turn = "learner"
            self._begin()
        try:
            yield
        finally:
            self._end()

    def _begin(self) -> None:
        self._at_work += 1
        self._idle.clear()

    def _end(self) -> None:
        self._at_work -= 1
        if not self._at_work:
            self._idle.set()


class SharedRollout:
    """Rollout whose engines share their GPUs with learners."""

    def __init__(self, engines: SleepingRollout, turns: GpuTimeSharing) -> None:
        self._engines, self._turns = engines, turns

    async def generate(
        self, requests: Sequence[GenerateRequest], *, version: int
    ) -> list[tuple[Completion, ...]]:
        async with self._turns.rollout(self._engines):
            return await self._engines.generate(requests, version=version)

    async def update(self, snapshot: WeightSnapshot) -> None:
        async with self._turns.rollout(self._engines, wake=lambda: self._engines.update(snapshot)):
            return


class SharedLearner:
    """Learner whose ranks share their GPUs with engines."""

    def __init__(self, group: SleepingLearner, turns: GpuTimeSharing) -> None:
        self._group, self._turns = group, turns

    async def step(self, batch: Batch, loss: Loss) -> dict[str, float]:
        async with self._turns.learner():
            return await self._group.step(batch, loss)

    async def outputs(self, rows: Sequence[Row], *, temperature: float) -> list[FloatArray]:
        async with self._turns.learner():
            return await self._group.outputs(rows, temperature=temperature)

    async def publish(self, version: int, *, stored: bool = False) -> WeightSnapshot:
        async with self._turns.learner():
            return await self._group.publish(version, stored=stored)

    async def save(self, directory: Path) -> None:
        async with self._turns.learner():
            await self._group.save(directory)

    async def load(self, directory: Path) -> None:
        async with self._turns.learner():
            await self._group.load(directory)

    async def export(self, directory: Path) -> None:
        async with self._turns.learner():
            await self._group.export(directory)

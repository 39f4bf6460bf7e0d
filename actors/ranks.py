"""Actors that run one model together, one per rank: the learner's, and a sharded reference's.

Synchronization: all ranks are called together. The group plans the micro-batches of every rank, so
that all take the same number of steps through the model: their collectives meet in each.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.process import ReportsProcess
from actors.remote import wait, wait_all
from actors.supervise import SupervisedActor
from rayhf.config.models import ModelName
from rayhf.config.schema import LearnerConfig, Packing, ReferenceConfig
from rayhf.errors import ActorLostError
from rayhf.learner.packing import plan_micro_batches
from rayhf.roles import Progress, no_progress
from rayhf.run_dir.epoch_guard import EpochGuard
from rayhf.types import FloatArray, Row


@contextmanager
def collectives() -> Iterator[None]:
    """Raise ActorLostError for a collective that breaks or times out.

    It means that another rank is gone; nothing is wrong with this one.
    """
    try:
        yield
    except RuntimeError as error:
        name = type(error).__name__
        text = str(error) or name
        marks = ("gloo", "NCCL", "Connection closed by peer")
        if name.startswith("Dist") or any(mark in text for mark in marks):
            raise ActorLostError(
                f"the ranks lost their connection ({text.splitlines()[0][:200]})"
            ) from error
        raise


class RankActor(ReportsProcess):
    """Base of the Ray actors around one rank's engine, which a subclass builds."""

    engine: Any
    epoch_guard: EpochGuard | None = None
    """Checks each write into a run directory."""

    def address(self) -> tuple[str, int]:
        """Return this node's address and a free port, at which the ranks find each other."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def outputs(self, rows: list[Row], temperature: float) -> list[FloatArray]:
        with collectives():
            outputs: list[FloatArray] = self.engine.outputs(rows, temperature)
            return outputs

    def save(self, directory: Path) -> None:
        if self.epoch_guard is not None:
            self.epoch_guard.check()
        with collectives():
            self.engine.save(directory)

    def load(self, directory: Path) -> None:
        with collectives():
            self.engine.load(directory)


class RankGroup:
    """One model over one or more ranks.

    Args:
        ranks: their actors, rank 0 first.
        config: the model's section of the config.
        timeout_s: limit on every call.
        chunk_timeout_s: limit on one chunk of `outputs`; the same by default.
    """

    def __init__(
        self,
        ranks: Sequence[SupervisedActor],
        config: LearnerConfig | ReferenceConfig,
        *,
        timeout_s: float,
        chunk_timeout_s: float | None = None,
    ) -> None:
        self._ranks = ranks
        self._config = config
        self._timeout_s = timeout_s
        self._chunk_timeout_s = chunk_timeout_s or timeout_s
        self._packing: Packing = "off"
        self._turn = asyncio.Lock()
        """Held for a chunk of `outputs`: its deadline counts for it alone."""
        self.names = [rank.name for rank in ranks]

    @property
    def _actors(self) -> list[ActorHandle]:
        return [rank.actor for rank in self._ranks]

    async def start(self, model: ModelName, **settings: Any) -> None:
        """Start every rank's engine; they find each other at rank 0."""
        await asyncio.gather(*(rank.start() for rank in self._ranks))
        master = await wait(
            self._actors[0].address.remote(),
            name=self.names[0],
            phase="start",
            timeout_s=self._timeout_s,
        )
        for rank in self._ranks:
            rank.stage = "building"
        calls = [
            actor.build.remote(
                model,
                self._config,
                rank=rank,
                world=len(self._ranks),
                master=master,
                **settings,
            )
            for rank, actor in enumerate(self._actors)
        ]
        self._packing = (await self._all("start", calls))[0]
        for rank in self._ranks:
            rank.stage = "ready"

    async def _all(
        self, phase: str, calls: list[ray.ObjectRef], *, timeout_s: float | None = None
    ) -> list[Any]:
        return await wait_all(
            calls, names=self.names, phase=phase, timeout_s=timeout_s or self._timeout_s
        )

    async def outputs(
        self,
        rows: Sequence[Row],
        *,
        temperature: float,
        progress: Progress = no_progress,
    ) -> list[FloatArray]:
        """Return one value per response token; a chunk is a micro-batch of every rank."""

        def call(actor: ActorHandle, rows: list[Row]) -> ray.ObjectRef:
            return actor.outputs.remote(rows, temperature)

        return await self._over_chunks(rows, call, progress)

    async def _over_chunks(
        self,
        rows: Sequence[Row],
        call: Callable[[ActorHandle, list[Row]], ray.ObjectRef],
        progress: Progress = no_progress,
    ) -> list[Any]:
        """Return what the ranks compute of each row; a chunk is a micro-batch of every rank."""
        longest = max(map(len, rows), default=0)
        plan = self._plan([(row,) for row in rows], budget=max(longest, self._config.token_budget))
        chunks = list(zip(*plan, strict=True))
        results: dict[int, Any] = {}
        for number, micros in enumerate(chunks, start=1):
            async with self._turn:
                calls = [
                    call(actor, [rows[i] for i in micro])
                    for actor, micro in zip(self._actors, micros, strict=True)
                ]
                phase = f"log-probs, chunk {number} of {len(chunks)}"
                outputs = await self._all(phase, calls, timeout_s=self._chunk_timeout_s)
            for micro, of_rank in zip(micros, outputs, strict=True):
                results |= dict(zip(micro, of_rank, strict=True))
            progress(number, len(chunks))
        return [results[i] for i in range(len(rows))]

    def _plan(
        self, examples: Sequence[Sequence[Row]], *, budget: int | None = None
    ) -> list[list[list[int]]]:
        return plan_micro_batches(
            examples,
            packing=self._packing,
            ranks=len(self._ranks),
            budget=budget or self._config.token_budget,
        )

    async def save(self, directory: Path) -> None:
        await self._all("checkpoint", [actor.save.remote(directory) for actor in self._actors])

    async def load(self, directory: Path) -> None:
        await self._all("restore", [actor.load.remote(directory) for actor in self._actors])

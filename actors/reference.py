"""The reference role: log-probs under frozen weights, in one or several equal actors.

In: rows, and weight snapshots where the reference follows the policy. Out: log-probs in nats.

Rows are cut into chunks of one forward pass each. The chunks of a call depend on its rows alone,
so it does not matter how many actors there are, nor which of them computes a chunk.

Synchronization: an actor has one chunk at a time, and its deadline counts for that chunk. A lost
actor is replaced by one with the same weights, and repeats its chunk; where nothing has these
weights any more, StateLostError is raised, and all actors are restarted from the last commit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt
import ray
from ray.actor import ActorHandle

from actors.process import ReportsAlive
from actors.remote import wait
from actors.supervise import SupervisedActor
from actors.transport import StoredWeights, without_payloads
from actors.watch import Call
from rayhf.config.models import ModelName
from rayhf.config.schema import LearnerConfig, Packing, ReferenceConfig
from rayhf.errors import ActorLostError, StateLostError
from rayhf.models.hub import local_directory, obtain
from rayhf.models.packing import pack_examples
from rayhf.run_dir.epoch_guard import EpochGuard
from rayhf.types import FloatArray, Row, TopLogprobs, WeightSnapshot

_ChunkCall = Callable[[ActorHandle, Sequence[Row]], ray.ObjectRef]
"""Sends an actor the rows of a chunk."""


class ReferenceActor(ReportsAlive):
    """Ray actor around one ReferenceEngine."""

    def build(
        self,
        model: ModelName,
        config: ReferenceConfig,
        *,
        dtype: str,
        device: str,
        learner: LearnerConfig,
        epoch_guard: EpochGuard,
    ) -> None:
        from rayhf.reference.engine import ReferenceEngine

        self.epoch_guard = epoch_guard
        obtain(model)
        self.engine = ReferenceEngine(
            local_directory(model), config, dtype=dtype, device=device, learner=learner
        )
        self.updates = 0
        """Number of the last update."""

    def packing(self) -> Packing:
        return self.engine.packing

    def logprobs(
        self, rows: Sequence[Row], temperature: float, model: Path | None
    ) -> list[FloatArray]:
        return self.engine.logprobs(rows, temperature, model)

    def top_logprobs(
        self, rows: Sequence[Row], temperature: float, top_k: int
    ) -> list[TopLogprobs]:
        return self.engine.top_logprobs(rows, temperature=temperature, top_k=top_k)

    def update(self, number: int, snapshot: WeightSnapshot, mix: float, *payloads: Any) -> None:
        """Take new weights, unless the actor got them as a replacement."""
        if number > self.updates:
            self.engine.update(list(zip(snapshot.buckets, payloads, strict=True)), mix=mix)
            self.updates = number

    def average(self) -> tuple[int, Mapping[str, npt.NDArray[Any]]]:
        """Return the number of the last update, and the moving average."""
        return self.updates, {name: t.numpy() for name, t in self.engine.average.items()}

    def restore(self, average: tuple[int, Mapping[str, npt.NDArray[Any]]]) -> None:
        """Continue another actor's moving average."""
        self.updates, tensors = average
        self.engine.restore(tensors)

    def save(self, directory: Path) -> None:
        self.epoch_guard.check()
        self.engine.save(directory)

    def load(self, directory: Path, number: int) -> None:
        self.engine.load(directory)
        self.updates = number


@dataclass(frozen=True, slots=True)
class _Update:
    """New weights for all actors."""

    number: int
    weights: StoredWeights
    mix: float

    def send(self, actor: ActorHandle) -> ray.ObjectRef:
        weights = self.weights
        return actor.update.remote(self.number, weights.snapshot, self.mix, *weights.payloads)


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """Directory of weights that all actors loaded after update `number`."""

    number: int
    directory: Path

    def send(self, actor: ActorHandle) -> ray.ObjectRef:
        return actor.load.remote(self.directory, self.number)


class ReferencePool:
    """Reference over equal actors, each of which is replaced when it is lost.

    Args:
        members: the actors.
        token_budget: tokens of a chunk, as in `reference.token_budget`.
        timeout_s: limit on one chunk, and on every other call.
    """

    def __init__(
        self, members: Sequence[SupervisedActor], *, token_budget: int, timeout_s: float
    ) -> None:
        self._members = members
        self._token_budget = token_budget
        self._timeout_s = timeout_s
        self._packing: Packing | None = None
        self._idle: asyncio.Queue[SupervisedActor] = asyncio.Queue()
        """Actors without a chunk."""
        self._number = 0
        """Of the last update."""
        self._source: _Update | _Checkpoint | Literal["average"] | None = None
        """What gives a new actor the current weights; "average": only another actor has them.
        None: the model that it is built from."""
        self._chunks = 0
        self._busy_s = 0.0
        for member in members:
            self._idle.put_nowait(member)
            member.prepare = partial(self._prepare, member)

    async def logprobs(
        self, rows: Sequence[Row], *, temperature: float, model: Path | None = None
    ) -> list[FloatArray]:
        return await self._over_chunks(
            rows, lambda actor, chunk: actor.logprobs.remote(chunk, temperature, model)
        )

    async def top_logprobs(
        self, rows: Sequence[Row], *, temperature: float, top_k: int
    ) -> list[TopLogprobs]:
        return await self._over_chunks(
            rows, lambda actor, chunk: actor.top_logprobs.remote(chunk, temperature, top_k)
        )

    async def _over_chunks(self, rows: Sequence[Row], call: _ChunkCall) -> list[Any]:
        """Return what the actors compute of each row, a chunk at a time."""
        if self._packing is None:
            self._packing = await self._persist(
                self._members[0], lambda actor: actor.packing.remote(), "start"
            )
        # In a thread: meanwhile the event loop sends other requests.
        chunks = await asyncio.to_thread(plan_chunks, rows, self._packing, self._token_budget)
        results = await asyncio.gather(
            *(
                self._compute(
                    [rows[i] for i in chunk],
                    call,
                    phase=f"reference log-probs, chunk {number} of {len(chunks)}",
                )
                for number, chunk in enumerate(chunks, start=1)
            )
        )
        by_row = dict(zip(chain(*chunks), chain(*results), strict=True))
        return [by_row[i] for i in range(len(rows))]

    async def _compute(self, rows: Sequence[Row], call: _ChunkCall, *, phase: str) -> list[Any]:
        """Return what is computed of one chunk, from the next actor that has none."""
        member = await self._idle.get()
        started = time.monotonic()
        try:
            results: list[Any] = await self._persist(member, lambda actor: call(actor, rows), phase)
        finally:
            self._idle.put_nowait(member)
        self._chunks += 1
        self._busy_s += time.monotonic() - started
        return results

    async def update(self, snapshot: WeightSnapshot, *, mix: float) -> None:
        payloads = [bucket.payload for bucket in snapshot.buckets]
        self._number += 1
        update = _Update(self._number, StoredWeights(without_payloads(snapshot), payloads), mix)
        if mix == 1:
            self._source = update
        await self._all("reference update", update.send)
        if mix < 1:
            # Until here, an actor that is replaced gets the weights before, and then this update.
            self._source = "average"

    async def save(self, directory: Path) -> None:
        await self._persist(
            self._members[0], lambda actor: actor.save.remote(directory), "checkpoint"
        )

    async def load(self, directory: Path) -> None:
        self._source = _Checkpoint(self._number, directory)
        await self._all("restore", self._source.send)

    async def take_counts(self) -> dict[str, float]:
        counts = {"reference/chunks": float(self._chunks), "time/reference_busy_s": self._busy_s}
        self._chunks = 0
        self._busy_s = 0.0
        return counts

    async def _all(self, phase: str, call: Call) -> None:
        await asyncio.gather(*(self._persist(member, call, phase) for member in self._members))

    async def _persist(self, member: SupervisedActor, call: Call, phase: str) -> Any:
        return await member.persist(call, phase=phase, timeout_s=self._timeout_s)

    # ------------------------------------------------------------------------------- replacements

    async def _prepare(self, member: SupervisedActor, actor: ActorHandle) -> None:
        """Bring a member's replacement to the current weights.

        Raises StateLostError where they do not exist any more.
        """
        if self._source == "average":
            await self._copy_average(member, actor)
        elif isinstance(self._source, _Checkpoint) and not self._source.directory.exists():
            # Newer checkpoints replaced it, each with these weights: a restart has one.
            raise StateLostError(
                f"{member.name} was lost, and the checkpoint of its weights is not kept any more"
            )
        elif self._source is not None:
            await self._wait(self._source.send(actor), member)

    async def _copy_average(self, member: SupervisedActor, actor: ActorHandle) -> None:
        lost: ActorLostError | None = None
        for other in self._members:
            if other is member:
                continue
            try:
                # From actor to actor. An update that is under way comes before or with it.
                await self._wait(actor.restore.remote(other.actor.average.remote()), member)
                return
            except ActorLostError as error:
                lost = error
        others = f"and so was every other replica: {lost}" if lost else "reference.replicas is 1"
        raise StateLostError(
            f"{member.name} was lost with the moving average of its weights, {others}"
        )

    async def _wait(self, call: ray.ObjectRef, member: SupervisedActor) -> None:
        await wait(
            call, name=f"new {member.name}", phase="reference weights", timeout_s=self._timeout_s
        )


def plan_chunks(rows: Sequence[Row], packing: Packing, token_budget: int) -> list[list[int]]:
    """Return the indices of the rows of each chunk: what one forward pass takes.

    An actor that gets a chunk packs it into one batch again.
    """
    batches = pack_examples([(row,) for row in rows], packing=packing, budget=token_budget)
    return [batch.examples for batch in batches]

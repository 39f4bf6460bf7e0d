"""How a policy's new weights get from its learner to its engines, one interface for every way.

`LearnerGroup.publish` says what the engines must get (a WeightSnapshot), `Transport.deliver` brings
it: through the object store, where the bytes lie already; by broadcast, while the learner gathers
and sends; or on the GPU that learner and engine share. Each engine confirms version, checksum and
probe. With LoRA adapters are brought, and whole weights where a reference takes them, too, or where
a broadcast is put into the object store afterwards: an engine takes either, whatever it held.

Who waits for whom: `deliver` waits for every engine and for whoever sends. An engine that is lost
while weights come straight from the learner ends in ActorLostError or DeadlineError, and everybody
starts again from the last commit; one that is lost at any other time is replaced and brought up
alone, as long as somebody still has its weights.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from actors.remote import wait, wait_all
from actors.supervise import SupervisedActor
from rayhf.errors import ActorLostError, WeightSyncError
from rayhf.types import TransportName, WeightSnapshot
from rayhf.weights.buckets import snapshot_checksum

if TYPE_CHECKING:
    from actors.learner import LearnerGroup

Stored = tuple[WeightSnapshot, list[Any]]
"""A snapshot without its bytes, and references to them in the object store."""


class Transport(Protocol):
    """One policy's way from its learner to its engines."""

    @property
    def stored(self) -> Stored | None:
        """What was delivered last, as long as the object store has it."""
        ...

    async def deliver(self, snapshot: WeightSnapshot) -> None:
        """Returns when every engine has confirmed. Raises WeightSyncError where one has not."""
        ...

    async def join_engine(self, actor: Any) -> None:
        """Bring a new engine to what was delivered last. Raises ActorLostError where nobody has
        that any more."""
        ...


def transport(
    name: TransportName,
    learner: LearnerGroup,
    engines: Sequence[SupervisedActor],
    *,
    workers: int,
    timeout_s: float,
) -> Transport:
    """`workers`: processes of one engine that hold weights. `timeout_s`: limit on every wait."""
    if name == "broadcast":
        return Broadcast(learner, engines, workers=workers, timeout_s=timeout_s)
    if name == "cuda_ipc":
        return CudaIpc(learner, engines, timeout_s=timeout_s)
    return ObjectStore(engines, timeout_s=timeout_s)


class ObjectStore:
    """Every engine fetches the same buckets; so does one that is hired later."""

    def __init__(self, engines: Sequence[SupervisedActor], *, timeout_s: float) -> None:
        self._engines, self._timeout_s = engines, timeout_s
        self.stored: Stored | None = None

    def keep(self, snapshot: WeightSnapshot) -> Stored:
        self.stored = _light(snapshot), [bucket.payload for bucket in snapshot.buckets]
        return self.stored

    async def deliver(self, snapshot: WeightSnapshot) -> None:
        light, payloads = self.keep(snapshot)
        await asyncio.gather(
            *(
                engine.persist(
                    lambda actor: actor.update.remote(light, *payloads),
                    phase="sync",
                    timeout_s=self._timeout_s,
                )
                for engine in self._engines
            )
        )

    async def join_engine(self, actor: Any) -> None:
        if self.stored is not None:
            light, payloads = self.stored
            call = actor.update.remote(light, *payloads)
            await wait(call, who="a new rollout engine", phase="sync", timeout_s=self._timeout_s)


class _FromLearner(ABC):
    """The bytes come from the learner's device; in rounds in which the reference fetches them, too,
    from the object store."""

    def __init__(
        self, learner: LearnerGroup, engines: Sequence[SupervisedActor], *, timeout_s: float
    ) -> None:
        self._learner, self._engines, self._timeout_s = learner, engines, timeout_s
        self._store = ObjectStore(engines, timeout_s=timeout_s)
        self._version: int | None = None
        self._delivering = False

    @property
    def stored(self) -> Stored | None:
        return self._store.stored

    async def deliver(self, snapshot: WeightSnapshot) -> None:
        self._version = snapshot.version
        if snapshot.transport == "object_store":
            await self._store.deliver(snapshot)
            return
        self._store.stored, self._delivering = None, True
        try:
            # Who died since it was last asked is replaced now, when that costs nothing.
            alive = [
                engine.persist(
                    lambda actor: actor.progress.remote(), phase="sync", timeout_s=self._timeout_s
                )
                for engine in self._engines
            ]
            await asyncio.gather(*alive)
            await self._carry(snapshot)
        finally:
            self._delivering = False

    async def join_engine(self, actor: Any) -> None:
        if self._version is None or self._delivering:
            return  # it has the weights of the start, or gets the new ones with everybody else
        if self._store.stored is None:
            await self._store_again(self._version)
        await self._store.join_engine(actor)

    @abstractmethod
    async def _carry(self, snapshot: WeightSnapshot) -> None: ...

    @abstractmethod
    async def _store_again(self, version: int) -> None:
        """Put the weights that were delivered into the object store, for an engine that came
        later."""

    @property
    def _names(self) -> list[str]:
        return [engine.name for engine in self._engines]


class Broadcast(_FromLearner):
    """Rank 0 of the learner sends to every worker of every engine, in a process group that is made
    anew when an engine is."""

    def __init__(
        self,
        learner: LearnerGroup,
        engines: Sequence[SupervisedActor],
        *,
        workers: int,
        timeout_s: float,
    ) -> None:
        super().__init__(learner, engines, timeout_s=timeout_s)
        self._workers = workers
        self._joined: list[Any] = []

    async def _carry(self, snapshot: WeightSnapshot) -> None:
        await self._meet()
        calls = [engine.actor.update.remote(snapshot) for engine in self._engines]
        calls += self._learner.send(snapshot.version)
        who = [*self._names, *self._learner.names]
        answers = await wait_all(calls, who=who, phase="sync", timeout_s=self._timeout_s)
        sent = snapshot_checksum(answers[len(self._engines)])
        for name, report in zip(self._names, answers, strict=False):
            if (report.version, report.checksum) != (snapshot.version, sent):
                raise WeightSyncError(
                    f"{name} confirmed weights {report.version} with checksum {report.checksum}, the learner sent weights "
                    f"{snapshot.version} with checksum {sent}"
                )

    async def _meet(self) -> None:
        actors = [engine.actor for engine in self._engines]
        if self._joined == actors:
            return
        self._joined = []
        meeting = await self._learner.open_broadcast(
            1 + len(actors) * self._workers, self._timeout_s
        )
        calls = [
            actor.join_broadcast.remote(meeting, 1 + i * self._workers)
            for i, actor in enumerate(actors)
        ]
        calls.append(self._learner.join_broadcast())
        who = [*self._names, self._learner.names[0]]
        await wait_all(calls, who=who, phase="sync", timeout_s=self._timeout_s)
        self._joined = actors

    async def _store_again(self, version: int) -> None:
        if self._learner.holds != version:
            raise ActorLostError(
                f"weights {version} were broadcast and are gone: the learner has changed them since"
            )
        self._store.keep(await self._learner.publish(version, stored=True))


class CudaIpc(_FromLearner):
    """Engine i loads from the memory of learner rank i, which is given back when all have
    confirmed."""

    async def _carry(self, snapshot: WeightSnapshot) -> None:
        light = _light(snapshot)
        calls = [
            engine.actor.update.remote(light, *(bucket.payload[i] for bucket in snapshot.buckets))
            for i, engine in enumerate(self._engines)
        ]
        await wait_all(calls, who=self._names, phase="sync", timeout_s=self._timeout_s)
        await self._learner.release()

    async def _store_again(self, version: int) -> None:
        raise ActorLostError(
            f"weights {version} went from GPU to GPU and nobody kept them for a new engine"
        )


def _light(snapshot: WeightSnapshot) -> WeightSnapshot:
    return replace(
        snapshot, buckets=tuple(replace(bucket, payload=None) for bucket in snapshot.buckets)
    )

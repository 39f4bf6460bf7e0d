"""Ways of a policy's new weights from its learner to its engines, behind one interface.

In: what `LearnerClient.publish` returns, a WeightSnapshot. Out: engines that hold these weights,
and have confirmed version, checksum and probe. The bytes come through the object store, where they
are already; by broadcast, while the learner gathers and sends them; or over the GPU that learner
and engine share. With LoRA only adapters are sent, and whole weights where a reference takes them
too, or where broadcast weights are stored afterwards: an engine takes either, whatever it held.

Synchronization: `deliver` waits for every engine and for the sender. An engine that is lost while
weights come straight from the learner ends in ActorLostError or DeadlineError, and all actors are
restarted from the last commit. One that is lost at any other time is replaced alone, as long as its
weights still exist.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import ray
from ray.actor import ActorHandle

from actors.remote import wait, wait_all
from actors.supervise import SupervisedActor
from rayhf.errors import LostObjectError, WeightSyncError
from rayhf.types import TransportName, WeightSnapshot
from rayhf.weights.buckets import snapshot_checksum

if TYPE_CHECKING:
    from actors.learner import LearnerClient
    from rayhf.rollout.engine import UpdateReport


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Weights in the object store."""

    snapshot: WeightSnapshot
    """Without payloads."""
    payloads: Sequence[ray.ObjectRef]
    """One per bucket."""

    def update(self, actor: ActorHandle) -> ray.ObjectRef:
        """Call an engine's `update` with these weights."""
        return actor.update.remote(self.snapshot, *self.payloads)


def without_payloads(snapshot: WeightSnapshot) -> WeightSnapshot:
    return replace(
        snapshot, buckets=tuple(replace(bucket, payload=None) for bucket in snapshot.buckets)
    )


class Transport(Protocol):
    """One policy's way of weights from its learner to its engines."""

    @property
    def stored(self) -> StoredWeights | None:
        """Weights that were delivered last, as long as the object store has them."""
        ...

    async def deliver(self, snapshot: WeightSnapshot) -> list[UpdateReport]:
        """Return when every engine has confirmed. Raise WeightSyncError where one has not."""
        ...

    async def join_engine(self, actor: ActorHandle) -> None:
        """Bring a new engine to the weights that were delivered last.

        Raises LostObjectError where they do not exist any more.
        """
        ...


def make_transport(
    name: TransportName,
    learner: LearnerClient,
    engines: Sequence[SupervisedActor],
    *,
    workers: int,
    timeout_s: float,
) -> Transport:
    """Return a transport by name.

    Args:
        name: of the transport.
        learner: the source.
        engines: the targets.
        workers: processes of one engine that hold weights.
        timeout_s: limit on every wait.
    """
    if name == "broadcast":
        return Broadcast(learner, engines, workers=workers, timeout_s=timeout_s)
    if name == "cuda_ipc":
        return CudaIpc(learner, engines, timeout_s=timeout_s)
    return ObjectStore(engines, timeout_s=timeout_s)


class ObjectStore:
    """Transport in which every engine fetches the same buckets, also one that is started later."""

    def __init__(self, engines: Sequence[SupervisedActor], *, timeout_s: float) -> None:
        self._engines = engines
        self._timeout_s = timeout_s
        self.stored: StoredWeights | None = None

    def keep(self, snapshot: WeightSnapshot) -> StoredWeights:
        payloads = [bucket.payload for bucket in snapshot.buckets]
        self.stored = StoredWeights(without_payloads(snapshot), payloads)
        return self.stored

    async def deliver(self, snapshot: WeightSnapshot) -> list[UpdateReport]:
        stored = self.keep(snapshot)
        reports: list[UpdateReport] = await asyncio.gather(
            *(
                engine.persist(stored.update, phase="sync", timeout_s=self._timeout_s)
                for engine in self._engines
            )
        )
        return reports

    async def join_engine(self, actor: ActorHandle) -> None:
        if self.stored is not None:
            await wait(
                self.stored.update(actor),
                name="a new rollout engine",
                phase="sync",
                timeout_s=self._timeout_s,
            )


class _DeviceTransport(ABC):
    """Transport in which the bytes come from the learner's device.

    In iterations in which the reference fetches them too, they come from the object store.
    """

    def __init__(
        self, learner: LearnerClient, engines: Sequence[SupervisedActor], *, timeout_s: float
    ) -> None:
        self._learner = learner
        self._engines = engines
        self._timeout_s = timeout_s
        self._store = ObjectStore(engines, timeout_s=timeout_s)
        self._version: int | None = None
        self._delivering = False

    @property
    def stored(self) -> StoredWeights | None:
        return self._store.stored

    async def deliver(self, snapshot: WeightSnapshot) -> list[UpdateReport]:
        self._version = snapshot.version
        if snapshot.transport == "object_store":
            return await self._store.deliver(snapshot)
        self._store.stored = None
        self._delivering = True
        try:
            # An engine that died since its last call is replaced now, before anything is sent.
            alive = [
                engine.persist(
                    lambda actor: actor.progress.remote(), phase="sync", timeout_s=self._timeout_s
                )
                for engine in self._engines
            ]
            await asyncio.gather(*alive)
            return await self._send(snapshot)
        finally:
            self._delivering = False

    async def join_engine(self, actor: ActorHandle) -> None:
        if self._version is None or self._delivering:
            return  # it has the initial weights, or gets the new ones together with the others
        if self._store.stored is None:
            await self._store_again(self._version)
        await self._store.join_engine(actor)

    @abstractmethod
    async def _send(self, snapshot: WeightSnapshot) -> list[UpdateReport]: ...

    @abstractmethod
    async def _store_again(self, version: int) -> None:
        """Put weights that were delivered into the object store, for a replaced engine."""

    @property
    def _names(self) -> list[str]:
        return [engine.name for engine in self._engines]


class Broadcast(_DeviceTransport):
    """Transport in which rank 0 of the learner sends to every worker of every engine.

    Their process group is opened again whenever an engine was replaced.
    """

    def __init__(
        self,
        learner: LearnerClient,
        engines: Sequence[SupervisedActor],
        *,
        workers: int,
        timeout_s: float,
    ) -> None:
        super().__init__(learner, engines, timeout_s=timeout_s)
        self._workers = workers
        self._members: list[ActorHandle] = []
        """Engines of the open group."""

    async def _send(self, snapshot: WeightSnapshot) -> list[UpdateReport]:
        await self._open_group()
        calls = [engine.actor.update.remote(snapshot) for engine in self._engines]
        calls += self._learner.send(snapshot.version)
        results = await wait_all(
            calls,
            names=[*self._names, *self._learner.names],
            phase="sync",
            timeout_s=self._timeout_s,
        )
        sent = snapshot_checksum(results[len(self._engines)])
        for name, report in zip(self._names, results, strict=False):
            if (report.version, report.checksum) != (snapshot.version, sent):
                raise WeightSyncError(
                    f"{name} confirmed weights {report.version} with checksum {report.checksum}, "
                    f"the learner sent weights {snapshot.version} with checksum {sent}"
                )
        return results[: len(self._engines)]

    async def _open_group(self) -> None:
        actors = [engine.actor for engine in self._engines]
        if self._members == actors:
            return
        self._members = []
        rendezvous = await self._learner.open_broadcast(
            1 + len(actors) * self._workers, self._timeout_s
        )
        calls = [
            actor.join_broadcast.remote(rendezvous, 1 + number * self._workers)
            for number, actor in enumerate(actors)
        ]
        calls.append(self._learner.join_broadcast())
        names = [*self._names, self._learner.names[0]]
        await wait_all(calls, names=names, phase="sync", timeout_s=self._timeout_s)
        self._members = actors

    async def _store_again(self, version: int) -> None:
        if self._learner.published_version != version:
            raise LostObjectError(
                f"weights {version} were broadcast and do not exist any more: the learner has "
                "changed them since"
            )
        self._store.keep(await self._learner.publish(version, stored=True))


class CudaIpc(_DeviceTransport):
    """Transport in which engine i loads from the GPU memory of learner rank i.

    The memory is freed when all engines have confirmed.
    """

    async def _send(self, snapshot: WeightSnapshot) -> list[UpdateReport]:
        announced = without_payloads(snapshot)
        calls = [
            engine.actor.update.remote(
                announced, *(bucket.payload[rank] for bucket in snapshot.buckets)
            )
            for rank, engine in enumerate(self._engines)
        ]
        reports = await wait_all(calls, names=self._names, phase="sync", timeout_s=self._timeout_s)
        await self._learner.release()
        return reports

    async def _store_again(self, version: int) -> None:
        raise LostObjectError(
            f"weights {version} were copied from GPU to GPU and are not kept for a new engine"
        )

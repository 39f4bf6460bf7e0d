"""The learner role: DeepSpeed engines in actors, one per rank, and the client in front of them.

In: batches and rows. Out: metrics, log-probs or values, weight snapshots.

Synchronization: all ranks are called together (actors/ranks.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.ranks import RankActor, RankGroup, collectives
from actors.remote import wait
from actors.supervise import SupervisedActor
from rayhf.config.models import ModelName
from rayhf.config.schema import LearnerConfig, Packing
from rayhf.losses.base import Loss, Totals
from rayhf.models.hub import local_directory, obtain
from rayhf.models.packing import distinct_tokens
from rayhf.run_dir.epoch_guard import EpochGuard
from rayhf.types import (
    Batch,
    Example,
    Probe,
    TransportName,
    WeightBucket,
    WeightSnapshot,
)
from rayhf.weights.buckets import snapshot_checksum

if TYPE_CHECKING:
    from rayhf.learner.engine import LearnerEngine
    from rayhf.weights.broadcast import Rendezvous, Sender


class LearnerActor(RankActor):
    """Ray actor around one rank's LearnerEngine."""

    engine: LearnerEngine
    _sender: Sender | None = None

    def build(
        self,
        model: ModelName,
        config: LearnerConfig,
        *,
        epoch_guard: EpochGuard | None = None,
        **settings: Any,
    ) -> Packing:
        """Build the engine and return how it feeds rows.

        `epoch_guard` checks each write into a run directory.
        """
        from rayhf.learner.engine import LearnerEngine
        from rayhf.learner.weight_sender import IpcSender

        self.epoch_guard = epoch_guard
        self._ipc_sender = IpcSender()
        obtain(model)
        self.engine = LearnerEngine(local_directory(model), config, **settings)
        return self.engine.packing

    def step(
        self, micros: list[list[Example]], totals: Totals, loss: Loss, temperature: float
    ) -> dict[str, float]:
        with collectives():
            return self.engine.step(micros, totals, loss, temperature)

    def probe(self) -> Probe:
        with collectives():
            return self.engine.probe()

    def publish(
        self, version: int, dtype: str, bucket_bytes: int, transport: TransportName, whole: bool
    ) -> tuple[list[WeightBucket], Probe]:
        from rayhf.learner.weight_sender import announce

        with collectives():
            if transport == "broadcast":
                return announce(self.engine, dtype, bucket_bytes)
            if transport == "cuda_ipc":
                return self._ipc_sender.publish(self.engine, dtype, bucket_bytes, version=version)
            probe = self.engine.probe()
            packed = self.engine.buckets(
                dtype, bucket_bytes, whole=whole, version=version, store=ray.put
            )
            return list(packed), probe

    def open_broadcast(self, members: int, timeout_s: float) -> Rendezvous:
        """Open a new process group, of which this rank is the sender."""
        from rayhf.weights.broadcast import Sender

        if self._sender is not None:
            self._sender.close()
        host = ray.util.get_node_ip_address()
        self._sender = Sender(host, members=members, timeout_s=timeout_s, device=self.engine.device)
        return self._sender.rendezvous

    def join_broadcast(self) -> None:
        assert self._sender is not None
        self._sender.join()

    def send(self, version: int, dtype: str, bucket_bytes: int) -> list[WeightBucket]:
        from rayhf.learner.weight_sender import send

        with collectives():
            return send(self.engine, version, dtype, bucket_bytes, self._sender)

    def sync_metrics(self) -> dict[str, float]:
        return self.engine.outgoing.metrics()

    def release(self) -> None:
        self._ipc_sender.release()

    def export(self, directory: Path) -> None:
        if self.epoch_guard is not None:
            self.epoch_guard.check()
        with collectives():
            self.engine.export(directory)

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()


class LearnerClient(RankGroup):
    """Learner over one or more data-parallel ranks.

    Args:
        ranks: their actors, rank 0 first.
        config: of the learner.
        sync_dtype: dtype in which weights are sent, that of the rollout engines.
        timeout_s: limit on every call.
        chunk_timeout_s: limit on one chunk of `outputs`; the same by default.
        transport: the usual way of weights to the engines.
    """

    def __init__(
        self,
        ranks: Sequence[SupervisedActor],
        config: LearnerConfig,
        *,
        sync_dtype: str,
        timeout_s: float,
        chunk_timeout_s: float | None = None,
        transport: TransportName = "object_store",
    ) -> None:
        super().__init__(ranks, config, timeout_s=timeout_s, chunk_timeout_s=chunk_timeout_s)
        self._transport = transport
        self._format = (sync_dtype, config.bucket_mib << 20)
        self.published_version: int | None = None
        """Version that was published last, until the next step changes the weights."""

    async def step(self, batch: Batch, loss: Loss) -> dict[str, float]:
        self.published_version = None
        shares = self._plan([example.rows for example in batch.examples])
        rows = [row for example in batch.examples for row in example.rows]
        totals = Totals(
            tokens=float(sum(len(row.response_ids) for row in rows)),
            rows=float(len(rows)),
            examples=float(len(batch.examples)),
            scalars=_sums(batch.examples),
        )
        calls = [
            actor.step.remote(
                [[batch.examples[i] for i in micro] for micro in micros],
                totals,
                loss,
                batch.temperature,
            )
            for actor, micros in zip(self._actors, shares, strict=True)
        ]
        metrics: dict[str, float] = (await self._all("learn", calls))[0]
        return {**metrics, "learner/tokens_distinct": float(distinct_tokens(rows))}

    async def probe(self) -> Probe:
        probes = await self._all("probe", [actor.probe.remote() for actor in self._actors])
        first: Probe = probes[0]
        return first

    async def publish(self, version: int, *, stored: bool = False) -> WeightSnapshot:
        """Return the current weights, ready to be sent.

        `stored`: whole weights in the object store, also with LoRA and whatever the transport,
        since a reference fetches them too.
        """
        transport: TransportName = "object_store" if stored else self._transport
        self.published_version = version
        calls = [
            actor.publish.remote(version, *self._format, transport, stored)
            for actor in self._actors
        ]
        published = await self._all("sync", calls)
        buckets, probe = published[0]
        if transport == "cuda_ipc":  # each engine opens the handles of its own GPU
            payloads = [[bucket.payload for bucket in of_rank] for of_rank, _ in published]
            buckets = [
                replace(bucket, payload=tuple(handles))
                for bucket, *handles in zip(buckets, *payloads, strict=True)
            ]
        return WeightSnapshot(
            version=version,
            buckets=tuple(buckets),
            checksum=snapshot_checksum(buckets),
            probe=probe,
            transport=transport,
        )

    async def open_broadcast(self, members: int, timeout_s: float) -> Rendezvous:
        """Open a process group of `members`, rank 0 included; return where the others join it."""
        call = self._actors[0].open_broadcast.remote(members, timeout_s)
        rendezvous: Rendezvous = await wait(
            call, name=self.names[0], phase="sync", timeout_s=self._timeout_s
        )
        return rendezvous

    def join_broadcast(self) -> ray.ObjectRef:
        """Call the sender; to be waited for together with the receivers' calls."""
        return self._actors[0].join_broadcast.remote()

    def send(self, version: int) -> list[ray.ObjectRef]:
        """Call every rank; to be waited for together with the receivers' calls.

        The first call returns the buckets with their checksums.
        """
        return [actor.send.remote(version, *self._format) for actor in self._actors]

    async def sync_metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = await wait(
            self._actors[0].sync_metrics.remote(),
            name=self.names[0],
            phase="sync",
            timeout_s=self._timeout_s,
        )
        return metrics

    async def release(self) -> None:
        """Free the memory of what was published on the device."""
        await self._all("sync", [actor.release.remote() for actor in self._actors])

    async def load(self, directory: Path) -> None:
        self.published_version = None
        await super().load(directory)

    async def export(self, directory: Path) -> None:
        await self._all("export", [actor.export.remote(directory) for actor in self._actors])

    async def sleep(self) -> None:
        """Free every rank's GPU and keep its state in host memory."""
        await self._all("sleep", [actor.sleep.remote() for actor in self._actors])

    async def wake(self) -> None:
        """Bring every rank's state back to its GPU."""
        await self._all("wake", [actor.wake.remote() for actor in self._actors])


def _sums(examples: Sequence[Example]) -> dict[str, float]:
    """Return the sum of each named scalar over examples; NaN counts as 0."""
    sums: dict[str, float] = {}
    for example in examples:
        for name, value in example.scalars.items():
            sums[name] = sums.get(name, 0.0) + (0.0 if math.isnan(value) else value)
    return sums

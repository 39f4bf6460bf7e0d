"""The learner role: one DeepSpeed engine per rank in actors, and the group that deals out a batch.

The group plans every rank's micro-batches in one place, so that all ranks take the same number of
steps through the model (their collectives meet in each), and all ranks are called together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.remote import wait, wait_all
from actors.supervise import ProcessInfo, SupervisedActor, process_info
from rayhf.config.schema import LearnerConfig
from rayhf.errors import ActorLostError
from rayhf.learner.packing import plan_micro_batches
from rayhf.losses.base import Loss, Totals
from rayhf.run_dir.epoch_guard import EpochGuard
from rayhf.types import Batch, Example, FloatArray, Row, TransportName, WeightBucket, WeightSnapshot
from rayhf.weights.buckets import snapshot_checksum

if TYPE_CHECKING:
    from rayhf.weights.broadcast import Rendezvous, Sender


@contextmanager
def _collectives() -> Iterator[None]:
    """A collective that breaks or times out means that another rank is gone: nothing is wrong with
    this one."""
    try:
        yield
    except RuntimeError as error:
        text = str(error) or type(error).__name__
        if type(error).__name__.startswith("Dist") or any(
            mark in text for mark in ("gloo", "NCCL", "Connection closed by peer")
        ):
            raise ActorLostError(
                f"the learner's ranks lost each other ({text.splitlines()[0][:200]})"
            ) from error
        raise


class LearnerActor:
    """A shell around one rank's LearnerEngine."""

    _sender: Sender | None = None

    def address(self) -> tuple[str, int]:
        """Where rank 0 can be met: its node's address and a free port."""
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def process_info(self) -> ProcessInfo:
        return process_info()

    def build(
        self,
        model: Path,
        config: LearnerConfig,
        *,
        epoch_guard: EpochGuard | None = None,
        **settings: Any,
    ) -> None:
        """A `epoch_guard` guards what is written into a run directory."""
        from rayhf.learner.engine import LearnerEngine
        from rayhf.learner.weight_sender import IpcSender

        self.epoch_guard, self._ipc_sender = epoch_guard, IpcSender()
        self.engine = LearnerEngine(model, config, **settings)

    def step(
        self, micros: list[list[Example]], totals: Totals, loss: Loss, temperature: float
    ) -> dict[str, float]:
        with _collectives():
            return self.engine.step(micros, totals, loss, temperature)

    def outputs(self, rows: list[Row], temperature: float) -> list[FloatArray]:
        with _collectives():
            return self.engine.outputs(rows, temperature)

    def publish(
        self, version: int, dtype: str, bucket_bytes: int, transport: TransportName, whole: bool
    ) -> tuple[list[WeightBucket], Any]:
        from rayhf.learner.weight_sender import announce

        with _collectives():
            if transport == "broadcast":
                return announce(self.engine, dtype, bucket_bytes)
            if transport == "cuda_ipc":
                return self._ipc_sender.publish(self.engine, dtype, bucket_bytes)
            buckets, probe = self.engine.publish(dtype, bucket_bytes, whole=whole)
        return [replace(bucket, payload=ray.put(bucket.payload)) for bucket in buckets], probe

    def open_broadcast(self, members: int, timeout_s: float) -> Rendezvous:
        """Begin a new group, of which this rank is the sender."""
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

        with _collectives():
            return send(self.engine, version, dtype, bucket_bytes, self._sender)

    def release(self) -> None:
        self._ipc_sender.release()

    def save(self, directory: Path) -> None:
        if self.epoch_guard is not None:
            self.epoch_guard.check()
        with _collectives():
            self.engine.save(directory)

    def load(self, directory: Path) -> None:
        with _collectives():
            self.engine.load(directory)

    def export(self, directory: Path) -> None:
        if self.epoch_guard is not None:
            self.epoch_guard.check()
        with _collectives():
            self.engine.export(directory)

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()


class LearnerGroup:
    """Learner over one or more data-parallel ranks."""

    def __init__(
        self,
        ranks: Sequence[SupervisedActor],
        config: LearnerConfig,
        *,
        sync_dtype: str,
        timeout_s: float,
        transport: TransportName = "object_store",
    ) -> None:
        """`sync_dtype`: the engines' dtype, in which weights travel."""
        self._ranks, self._config, self._timeout_s = ranks, config, timeout_s
        self._transport, self._wire = transport, (sync_dtype, config.bucket_mib << 20)
        self.names = [rank.name for rank in ranks]
        self.holds: int | None = None
        """The version that was published last, until the next step changes the weights."""

    @property
    def _actors(self) -> list[Any]:
        return [rank.actor for rank in self._ranks]

    async def start(self, model: Path, **settings: Any) -> None:
        """Start every rank's engine; they meet at rank 0."""
        await asyncio.gather(*(rank.start() for rank in self._ranks))
        master = await wait(
            self._actors[0].address.remote(),
            who=self.names[0],
            phase="start",
            timeout_s=self._timeout_s,
        )
        world = len(self._ranks)
        for one in self._ranks:
            one.stage = "building"
        calls = [
            actor.build.remote(
                model, self._config, rank=rank, world=world, master=master, **settings
            )
            for rank, actor in enumerate(self._actors)
        ]
        await self._all("start", calls)
        for one in self._ranks:
            one.stage = "ready"

    async def _all(self, phase: str, calls: list[ray.ObjectRef]) -> list[Any]:
        return await wait_all(calls, who=self.names, phase=phase, timeout_s=self._timeout_s)

    async def step(self, batch: Batch, loss: Loss) -> dict[str, float]:
        self.holds = None
        lengths = [[len(row) for row in example.rows] for example in batch.examples]
        hands = plan_micro_batches(
            lengths, ranks=len(self._actors), budget=self._config.token_budget
        )
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
            for actor, micros in zip(self._actors, hands, strict=True)
        ]
        metrics: dict[str, float] = (await self._all("learn", calls))[0]
        return metrics

    async def outputs(self, rows: Sequence[Row], *, temperature: float) -> list[FloatArray]:
        world = len(self._actors)
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
        hands = [order[rank::world] for rank in range(world)]  # like lengths on every rank
        calls = [
            a.outputs.remote([rows[i] for i in h], temperature)
            for a, h in zip(self._actors, hands, strict=True)
        ]
        results: dict[int, FloatArray] = {}
        for hand, answer in zip(hands, await self._all("log-probs", calls), strict=True):
            results |= dict(zip(hand, answer, strict=True))
        return [results[i] for i in range(len(rows))]

    async def publish(self, version: int, *, stored: bool = False) -> WeightSnapshot:
        """`stored`: whole and in the object store, whatever the way and also with LoRA: a reference
        may fetch them, too."""
        transport = "object_store" if stored else self._transport
        self.holds = version
        answers = await self._all(
            "sync",
            [
                actor.publish.remote(version, *self._wire, transport, stored)
                for actor in self._actors
            ],
        )
        buckets, probe = answers[0]
        if transport == "cuda_ipc":
            handles = zip(
                *([bucket.payload for bucket in found] for found, _ in answers), strict=True
            )
            buckets = [
                replace(bucket, payload=each) for bucket, each in zip(buckets, handles, strict=True)
            ]
        checksum = snapshot_checksum(buckets)
        return WeightSnapshot(
            version=version,
            buckets=tuple(buckets),
            checksum=checksum,
            probe=probe,
            transport=transport,
        )

    async def open_broadcast(self, members: int, timeout_s: float) -> Rendezvous:
        """A new group for broadcasts, of `members` including rank 0, and where the others meet
        it."""
        call = self._actors[0].open_broadcast.remote(members, timeout_s)
        meeting: Rendezvous = await wait(
            call, who=self.names[0], phase="sync", timeout_s=self._timeout_s
        )
        return meeting

    def join_broadcast(self) -> ray.ObjectRef:
        """The sender's call, to be waited for together with the receivers'."""
        return self._actors[0].join_broadcast.remote()

    def send(self, version: int) -> list[ray.ObjectRef]:
        """Every rank's call, to be waited for together with the receivers'; the first answers with
        the sealed buckets."""
        return [actor.send.remote(version, *self._wire) for actor in self._actors]

    async def release(self) -> None:
        """Give back the memory of what was published on the device."""
        await self._all("sync", [actor.release.remote() for actor in self._actors])

    async def save(self, directory: Path) -> None:
        await self._all("checkpoint", [actor.save.remote(directory) for actor in self._actors])

    async def load(self, directory: Path) -> None:
        self.holds = None
        await self._all("restore", [actor.load.remote(directory) for actor in self._actors])

    async def export(self, directory: Path) -> None:
        await self._all("export", [actor.export.remote(directory) for actor in self._actors])

    async def sleep(self) -> None:
        """Every rank gives its GPU up; its state waits in host memory."""
        await self._all("sleep", [actor.sleep.remote() for actor in self._actors])

    async def wake(self) -> None:
        """Every rank takes its GPU again."""
        await self._all("wake", [actor.wake.remote() for actor in self._actors])


def _sums(examples: Sequence[Example]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for example in examples:
        for name, value in example.scalars.items():
            sums[name] = sums.get(name, 0.0) + (value if value == value else 0.0)
    return sums


RemoteLearner = ray.remote(LearnerActor)

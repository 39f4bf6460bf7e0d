"""Weight transports: the choice by placement, what a broadcast refuses, and replaced engines.

The process groups are real (gloo, threads of this process); the model and Ray are not there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.transport import Broadcast, CudaIpc
from rayhf.config.load import load_config
from rayhf.errors import ActorLostError, ConfigError, DeadlineError, WeightSyncError
from rayhf.planning.preflight import check_settings, transport_of
from rayhf.types import Probe, TransportName, WeightBucket, WeightSnapshot
from rayhf.weights.broadcast import Receiver, Sender
from rayhf.weights.buckets import (
    bucket_layout,
    device_checksum,
    pack_bucket,
    snapshot_checksum,
    unpack_bucket,
)

CPU = torch.device("cpu")
SHAPES = ([("a", (3, 5)), ("b", (70_000,))], [("c", (2,))], [("d", (1 << 20,))])
"""Three buckets: some rows of the checksum and a rest, almost nothing, and more than a socket
holds."""
BUCKETS = [
    WeightBucket(tensors=bucket_layout(shapes, torch.float32), payload=None, checksum="")
    for shapes in SHAPES
]


# --------------------------------------------------------------------------------------- the choice


def config(cluster: dict[str, Any], **sections: Any) -> Any:
    data = {
        "run": {"dir": "r", "iterations": 1},
        "policy": {"model": "m"},
        "prompts": {"train": "t", "batch": 4},
        "algorithm": {"type": "online_dpo"},
        "scorer": {"train": [{"type": "rule", "function": "a:b"}]},
        "cluster": cluster,
    }
    return load_config(data | sections)


GPU, SHARED = {"device": "gpu"}, {"device": "gpu", "placement": "colocate"}


@pytest.mark.parametrize(
    ("cluster", "engines", "expected"),
    [
        ({}, 1, "object_store"),
        ({"transport": "broadcast"}, 2, "broadcast"),
        (GPU, 2, "broadcast"),
        (GPU | {"transport": "object_store"}, 1, "object_store"),
        (SHARED, 1, "cuda_ipc"),
        (SHARED, 2, "object_store"),
        (SHARED | {"transport": "object_store"}, 1, "object_store"),
    ],
)
def test_transport_follows_from_the_placement(
    cluster: dict[str, Any], engines: int, expected: str
) -> None:
    assert transport_of(config(cluster, rollout={"engines": engines})) == expected


@pytest.mark.parametrize(
    ("cluster", "engines", "message"),
    [
        (
            SHARED | {"transport": "broadcast"},
            1,
            r"a device for each actor.*expected cuda_ipc, object_store or auto",
        ),
        (
            {"placement": "colocate", "transport": "broadcast"},
            1,
            "broadcast needs a device for each actor",
        ),
        (
            {"transport": "cuda_ipc"},
            1,
            r"cuda_ipc needs GPUs that engines and learners share; cluster.device is cpu",
        ),
        (
            GPU | {"transport": "cuda_ipc"},
            1,
            "cluster.placement separate; expected broadcast, object_store or auto",
        ),
        (
            SHARED | {"transport": "cuda_ipc"},
            2,
            r"rollout.engines is 2, expected learner.ranks 1 \(or transport object_store\)",
        ),
    ],
)
def test_transport_that_a_placement_lacks_is_refused(
    cluster: dict[str, Any], engines: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check_settings(config(cluster, rollout={"engines": engines}))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- the checksum


@settings(deadline=None)
@given(words=st.integers(2, 20_000), data=st.data())
def test_checksum_detects_flipped_bits_and_swapped_words(words: int, data: Any) -> None:
    generator = torch.Generator().manual_seed(words)
    flat = torch.randint(0, 256, (8 * words,), dtype=torch.uint8, generator=generator)
    before = int(device_checksum(flat))
    position = data.draw(st.integers(0, 8 * words - 1))
    flat[position] ^= 1 << data.draw(st.integers(0, 7))
    assert int(device_checksum(flat)) != before
    first, second = data.draw(
        st.lists(st.integers(0, words - 1), min_size=2, max_size=2, unique=True)
    )
    before, whole = int(device_checksum(flat)), flat.view(torch.int64)
    whole[[first, second]] = whole[[second, first]]
    assert int(device_checksum(flat)) != before


@pytest.mark.parametrize(
    ("first", "second"), [(0, 1), (7, 4096 + 7), (5, 4096 * 5), (4096 * 2, 4096 * 2 + 1)]
)
def test_checksum_detects_swapped_neighbors(first: int, second: int) -> None:
    flat = torch.arange(5 * 4096 + 9).view(torch.uint8)
    before, words = int(device_checksum(flat)), flat.view(torch.int64)
    words[[first, second]] = words[[second, first]]
    assert int(device_checksum(flat)) != before


def test_checksum_depends_on_the_number_of_zeros() -> None:
    assert (
        len(
            {
                int(device_checksum(torch.zeros(8 * n, dtype=torch.uint8)))
                for n in (0, 1, 4096, 4097, 8192)
            }
        )
        == 5
    )


# -------------------------------------------------------------------------------------- the channel


@contextmanager
def group(
    receivers: int, *, sender: type[Sender] = Sender, timeout_s: float = 20.0
) -> Iterator[tuple[Any, list[Receiver]]]:
    one = sender("127.0.0.1", members=1 + receivers, timeout_s=timeout_s, device=CPU)
    with ThreadPoolExecutor() as pool:
        others = [
            pool.submit(Receiver, one.rendezvous, rank, CPU) for rank in range(1, receivers + 1)
        ]
        one.join()
        joined = [other.result(20) for other in others]
    yield one, joined
    for member in (one, *joined):
        member.close()


def tensors_of(version: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(version)
    return [[torch.randn(shape, generator=generator) for _, shape in shapes] for shapes in SHAPES]


def send(sender: Sender, version: int) -> list[WeightBucket]:
    for bucket, tensors in zip(BUCKETS, tensors_of(version), strict=True):
        sender.send(version, bucket.tensors, tensors)
    return sender.finish()


def receive(receiver: Receiver, version: int) -> tuple[list[WeightBucket], dict[str, torch.Tensor]]:
    buckets, found = [], {}
    for bucket, flat in receiver.receive(version, BUCKETS):
        buckets.append(bucket)
        found |= {name: tensor.clone() for name, tensor in unpack_bucket(bucket, flat)}
    return buckets, found


def test_all_receivers_get_each_version() -> None:
    with group(2) as (sender, receivers), ThreadPoolExecutor() as pool:
        for version in (1, 2):
            results = [pool.submit(receive, receiver, version) for receiver in receivers]
            sealed = send(sender, version)
            expected = [tensor for tensors in tensors_of(version) for tensor in tensors]
            for result in results:
                buckets, found = result.result(20)
                assert buckets == sealed and all(bucket.checksum for bucket in buckets)
                assert list(found) == ["a", "b", "c", "d"]
                assert all(
                    torch.equal(tensor, mine)
                    for tensor, mine in zip(expected, found.values(), strict=True)
                )


class Damaging(Sender):
    """Sender that flips one bit of the second bucket."""

    sent = 0

    def transmit(self, flat: torch.Tensor) -> Any:
        self.sent += 1
        flat[3] ^= 16 * (self.sent == 2)
        return super().transmit(flat)


def test_damaged_bucket_is_refused() -> None:
    with group(1, sender=Damaging) as (sender, (receiver,)), ThreadPoolExecutor() as pool:
        result = pool.submit(receive, receiver, 1)
        pool.submit(send, sender, 1)
        with pytest.raises(
            WeightSyncError,
            match=r"bucket 2 of 3 of weights 1: received checksum \w{16}, the learner sent",
        ):
            result.result(20)


def test_buckets_of_another_version_are_refused() -> None:
    with group(1, timeout_s=2.0) as (sender, (receiver,)), ThreadPoolExecutor() as pool:
        result = pool.submit(receive, receiver, 2)
        pool.submit(send, sender, 1)
        with pytest.raises(
            WeightSyncError,
            match="bucket 1 of 3 of weights 2: received bucket 1 of weights 1 instead",
        ):
            result.result(20)


def test_lost_and_silent_members_are_noticed() -> None:
    with (
        group(1, timeout_s=1.0) as (sender, (receiver,)),
        pytest.raises(
            DeadlineError, match=r"weights by broadcast, receiving: .*(Timed out|timeout)"
        ),
    ):
        receive(receiver, 1)
    with group(2) as (sender, (receiver, other)), ThreadPoolExecutor() as pool:
        pool.submit(other.close)
        with pytest.raises(ActorLostError, match="weights by broadcast, sending: "):
            send(sender, 1)
    with pytest.raises(DeadlineError, match="waiting for all members: wait timeout"):
        Sender("127.0.0.1", members=2, timeout_s=1.0, device=CPU).join()


# ----------------------------------------------------------------------------------------- the role

POOL = ThreadPoolExecutor(16)


def remote(function: Callable[..., Any]) -> Any:
    """Return a method of an actor's handle, which runs in a thread."""

    def call(*arguments: Any) -> Any:
        future: Future[Any] = POOL.submit(function, *arguments)
        return SimpleNamespace(future=lambda: future)

    return SimpleNamespace(remote=call)


class Engine:
    """Fake of a SupervisedActor, its actor, and the engine in it."""

    def __init__(self, name: str, workers: int = 1) -> None:
        self.name, self.workers, self.version, self.joined = name, workers, 0, 0
        self.actor: Any = SimpleNamespace(
            join_broadcast=remote(self.join),
            update=remote(self.update),
            progress=remote(lambda: 1),
            lost=False,
        )
        self.prepare: Any = None

    async def persist(self, call: Any, *, phase: str, timeout_s: float) -> Any:
        if self.actor.lost:
            self.actor = SimpleNamespace(**{**vars(self.actor), "lost": False})
            self.version = 0
            await self.prepare(self.actor)
        return await asyncio.wrap_future(call(self.actor).future())

    def join(self, meeting: Any, first: int) -> None:
        self.joined += 1
        ranks = range(first, first + self.workers)
        self.receivers = [
            future.result(20)
            for future in [POOL.submit(Receiver, meeting, rank, CPU) for rank in ranks]
        ]

    def update(self, snapshot: WeightSnapshot, *payloads: Any) -> Any:
        if snapshot.transport == "broadcast":
            received = [
                POOL.submit(receive, receiver, snapshot.version) for receiver in self.receivers
            ]
            (checksum,) = {snapshot_checksum(each.result(20)[0]) for each in received}
        else:
            checksum = snapshot.checksum
            assert len(payloads) == len(snapshot.buckets)
        self.version = snapshot.version
        return SimpleNamespace(version=snapshot.version, checksum=checksum)


class Learner:
    """Fake LearnerClient with a real sender on rank 0; rank 1 only gathers.

    `wrong_checksums`: report them.
    """

    def __init__(self) -> None:
        self.names = ["learner rank 0", "learner rank 1"]
        self.published_version: int | None = None
        self.wrong_checksums = False
        self.stored = 0
        """Number of snapshots published to the object store."""

    async def publish(self, version: int, *, stored: bool = False) -> WeightSnapshot:
        self.published_version = version
        self.stored += stored
        buckets = tuple(BUCKETS)
        name: TransportName = "object_store" if stored else "broadcast"
        if stored:
            buckets = tuple(
                pack_bucket([(s.name, torch.ones(s.shape)) for s in b.tensors], torch.float32)
                for b in BUCKETS
            )
        probe = Probe(token_ids=(), logprobs=())
        checksum = snapshot_checksum(buckets)
        return WeightSnapshot(
            version=version, buckets=buckets, checksum=checksum, probe=probe, transport=name
        )

    async def open_broadcast(self, members: int, timeout_s: float) -> Any:
        self.sender = Sender("127.0.0.1", members=members, timeout_s=timeout_s, device=CPU)
        return self.sender.rendezvous

    def join_broadcast(self) -> Any:
        return remote(self.sender.join).remote()

    def send(self, version: int) -> list[Any]:
        return [remote(self._send).remote(version), remote(list).remote()]

    def _send(self, version: int) -> list[WeightBucket]:
        sealed = send(self.sender, version)
        return (
            [replace(bucket, checksum="0" * 16) for bucket in sealed]
            if self.wrong_checksums
            else sealed
        )


def run(scenario: Callable[[Any, Learner, list[Engine]], Any]) -> None:
    learner = Learner()
    engines = [Engine("rollout engine 0", workers=2), Engine("rollout engine 1", workers=2)]
    broadcast = Broadcast(learner, engines, workers=2, timeout_s=20.0)  # type: ignore[arg-type]
    for engine in engines:
        engine.prepare = broadcast.join_engine
    asyncio.run(scenario(broadcast, learner, engines))


def test_every_worker_of_every_engine_gets_each_version() -> None:
    async def scenario(broadcast: Broadcast, learner: Learner, engines: list[Engine]) -> None:
        for version in (1, 2):
            await broadcast.deliver(await learner.publish(version))
            assert [engine.version for engine in engines] == [version] * 2
        assert [engine.joined for engine in engines] == [1, 1] and learner.stored == 0

    run(scenario)


def test_replaced_engine_gets_weights_while_the_learner_has_them() -> None:
    async def scenario(broadcast: Broadcast, learner: Learner, engines: list[Engine]) -> None:
        await broadcast.join_engine(engines[0].actor)
        assert engines[0].version == 0 and learner.stored == 0  # nothing was delivered yet
        await broadcast.deliver(await learner.publish(1))
        for engine in engines:
            engine.version = 0
            await broadcast.join_engine(engine.actor)
            assert engine.version == 1
        assert learner.stored == 1  # one copy serves both
        learner.published_version = None
        await broadcast.deliver(await learner.publish(2))
        learner.published_version = None  # a step later
        with pytest.raises(
            ActorLostError, match="weights 2 were broadcast and do not exist any more"
        ):
            await broadcast.join_engine(engines[0].actor)

    run(scenario)


def test_engine_that_died_before_a_broadcast_joins_a_new_group() -> None:
    async def scenario(broadcast: Broadcast, learner: Learner, engines: list[Engine]) -> None:
        await broadcast.deliver(await learner.publish(1))
        learner.published_version = None
        engines[1].actor.lost = True
        await broadcast.deliver(await learner.publish(2))
        assert [engine.version for engine in engines] == [2, 2]
        assert [engine.joined for engine in engines] == [2, 2] and learner.stored == 0

    run(scenario)


def test_stored_snapshot_is_fetched_from_the_object_store() -> None:
    async def scenario(broadcast: Broadcast, learner: Learner, engines: list[Engine]) -> None:
        await broadcast.deliver(await learner.publish(1, stored=True))
        assert [(engine.version, engine.joined) for engine in engines] == [(1, 0), (1, 0)]
        learner.published_version = None
        engines[0].version = 0
        await broadcast.join_engine(engines[0].actor)
        assert engines[0].version == 1

    run(scenario)


def test_engine_that_confirms_another_checksum_is_refused() -> None:
    async def scenario(broadcast: Broadcast, learner: Learner, engines: list[Engine]) -> None:
        learner.wrong_checksums = True
        with pytest.raises(
            WeightSyncError,
            match=r"engine 0 confirmed weights 1 with checksum .*, the learner sent weights 1",
        ):
            await broadcast.deliver(await learner.publish(1))

    run(scenario)


def test_each_engine_gets_the_handles_of_its_own_gpu() -> None:
    taken: dict[str, tuple[Any, ...]] = {}
    released: list[int] = []

    class SharingEngine(Engine):
        def update(self, snapshot: WeightSnapshot, *payloads: Any) -> None:
            assert all(bucket.payload is None for bucket in snapshot.buckets) and not released
            taken[self.name] = payloads

    async def release() -> None:
        released.append(len(taken))

    async def scenario() -> None:
        engines = [SharingEngine("engine 0"), SharingEngine("engine 1")]
        transport = CudaIpc(SimpleNamespace(release=release), engines, timeout_s=20.0)  # type: ignore[arg-type]
        snapshot = await Learner().publish(3)
        buckets = tuple(
            replace(b, payload=(f"{i} on GPU 0", f"{i} on GPU 1"))
            for i, b in enumerate(snapshot.buckets)
        )
        await transport.deliver(replace(snapshot, buckets=buckets, transport="cuda_ipc"))
        assert taken == {
            f"engine {gpu}": tuple(f"{i} on GPU {gpu}" for i in range(3)) for gpu in (0, 1)
        } and released == [2]
        with pytest.raises(ActorLostError, match="weights 3 were copied from GPU to GPU"):
            await transport.join_engine(engines[0].actor)

    asyncio.run(scenario())

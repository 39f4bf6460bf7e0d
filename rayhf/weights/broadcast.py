"""Weights by broadcast: a process group of their own. Rank 0 is the learner's sender, the others
are the workers of all engines.

In on one side: tensors. Out on the other: the buckets they were packed into, on the receiver's
device, each checked against the seal that it carries. NCCL between GPUs, gloo between CPUs, and
nothing else differs; torch's default group is not touched, since DeepSpeed and vLLM each have
theirs.

Who waits for whom: opening waits for nobody, joining for all members. A bucket is on its way while
the sender gathers and packs the next, and arrives while the receiver loads the one before. Every
wait ends after `timeout_s`: with gloo as an error here; with NCCL torch's watchdog ends the
process, which its supervisor sees. Like every torch process group this one trusts the network
between its members.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import BroadcastOptions, PrefixStore, Store

from rayhf.errors import ActorLostError, DeadlineError, WeightSyncError
from rayhf.types import TensorSpec, WeightBucket
from rayhf.weights.buckets import device_checksum, fill, hexadecimal, nbytes_of

SEAL_BYTES = 16
"""Behind a bucket's tensors: its checksum, and which bucket of which version it is."""
_MOST_BUCKETS = 1 << 20


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the members of one group find each other."""

    host: str
    port: int
    members: int
    timeout_s: float


class Sender:
    """Rank 0 of one group. Raises ActorLostError where a member is gone, DeadlineError where one
    does not get on."""

    def __init__(self, host: str, *, members: int, timeout_s: float, device: torch.device) -> None:
        """`host`: this machine's address, as the other members see it."""
        timeout = timedelta(seconds=timeout_s)
        self._store = TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        self.meeting = Rendezvous(host, self._store.port, members, timeout_s)
        self._device = device
        self._group: Any = None
        self._flying: tuple[Any, Tensor] | None = None
        self._sealed: list[tuple[tuple[TensorSpec, ...], Tensor]] = []

    def join(self) -> None:
        """Wait for all members."""
        self._group = _join(self._store, self.meeting, 0, self._device)

    def close(self) -> None:
        """Leave the group, also where others are gone. Safe to call twice."""
        self._flying = None  # gloo closes its connections when nobody holds the group any more
        if self._group is not None:
            self._group.abort()
        self._group = None

    def send(self, version: int, specs: tuple[TensorSpec, ...], tensors: Iterable[Tensor]) -> None:
        """Pack one bucket and let it go; the tensors are free again when this returns."""
        flat = torch.zeros(nbytes_of(specs) + SEAL_BYTES, dtype=torch.uint8, device=self._device)
        fill(flat, specs, tensors)
        self._sealed.append((specs, _seal(flat, version, len(self._sealed))))
        self._land()
        self._flying = self._launch(flat), flat

    def finish(self) -> list[WeightBucket]:
        """Wait until the last one is away; what was sent since the last time, with checksums and
        without bytes."""
        self._land()
        sealed, self._sealed = self._sealed, []
        return [
            WeightBucket(tensors=specs, payload=None, checksum=hexadecimal(int(total)))
            for specs, total in sealed
        ]

    def _launch(self, flat: Tensor) -> Any:
        with _translated("sending"):
            return _broadcast(self._group, flat)

    def _land(self) -> None:
        if self._flying is not None:
            with _translated("sending"):
                self._flying[0].wait()
            self._flying = None


class Receiver:
    """One worker's place in a group. Joins when it is made; raises as Sender does, and where the
    sender is gone."""

    def __init__(self, meeting: Rendezvous, rank: int, device: torch.device) -> None:
        with _translated("meeting the learner"):
            timeout = timedelta(seconds=meeting.timeout_s)
            store = TCPStore(meeting.host, meeting.port, is_master=False, timeout=timeout)
        self._device = device
        self._group = _join(store, meeting, rank, device)

    def close(self) -> None:
        """Leave the group, also where others are gone. Safe to call twice."""
        if self._group is not None:
            self._group.abort()
        self._group = None

    def arrivals(
        self, version: int, buckets: Sequence[WeightBucket]
    ) -> Iterator[tuple[WeightBucket, Tensor]]:
        """Each announced bucket with its checksum, and its bytes. Raises WeightSyncError for one
        that is not what was sealed."""
        coming = [self._expect(buckets[0])]
        for number, bucket in enumerate(buckets):
            coming += [self._expect(following) for following in buckets[number + 1 : number + 2]]
            work, flat = coming.pop(0)
            with _translated("receiving"):
                work.wait()
            yield (
                replace(bucket, checksum=_check_seal(flat, version, number, len(buckets))),
                flat[:-SEAL_BYTES],
            )

    def _expect(self, bucket: WeightBucket) -> tuple[Any, Tensor]:
        flat = torch.empty(
            nbytes_of(bucket.tensors) + SEAL_BYTES, dtype=torch.uint8, device=self._device
        )
        with _translated("receiving"):
            return _broadcast(self._group, flat), flat


def _join(store: Store, meeting: Rendezvous, rank: int, device: torch.device) -> Any:
    import torch.distributed.distributed_c10d as c10d

    timeout = timedelta(seconds=meeting.timeout_s)
    store = PrefixStore("weights", store)
    with _translated("meeting the others"):
        if device.type == "cpu":
            return c10d.ProcessGroupGloo(store, rank, meeting.members, timeout)
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return c10d.ProcessGroupNCCL(store, rank, meeting.members, options)


def _broadcast(group: Any, flat: Tensor) -> Any:
    options = BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    options.asyncOp = True  # NCCL would otherwise run on the stream that gathers, packs and loads
    return group.broadcast([flat], options)


def _stamp(version: int, number: int) -> int:
    return version * _MOST_BUCKETS + number


def _seal(flat: Tensor, version: int, number: int) -> Tensor:
    """Write the seal into the buffer's end; the checksum, still on the device."""
    total = device_checksum(flat[:-SEAL_BYTES])
    seal = flat[-SEAL_BYTES:].view(torch.int64)
    seal[0], seal[1] = total, _stamp(version, number)
    return total


def _check_seal(flat: Tensor, version: int, number: int, of: int) -> str:
    found = int(device_checksum(flat[:-SEAL_BYTES]))
    sent, stamp = flat[-SEAL_BYTES:].view(torch.int64).tolist()
    where = f"weight bucket {number + 1} of {of} of weights {version}"
    if found != sent:
        raise WeightSyncError(
            f"{where}: received checksum {hexadecimal(found)}, the learner sent {hexadecimal(sent)}"
        )
    if stamp != _stamp(version, number):
        was = f"bucket {stamp % _MOST_BUCKETS + 1} of weights {stamp // _MOST_BUCKETS}"
        raise WeightSyncError(f"{where}: what arrived is {was}")
    return hexadecimal(found)


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    """torch raises RuntimeErrors, whatever happened to a connection."""
    try:
        yield
    except RuntimeError as error:
        line = (str(error) or type(error).__name__).splitlines()[0][:200]
        late = "timed out" in line.lower() or "timeout" in line.lower()
        raise (DeadlineError if late else ActorLostError)(
            f"weights by broadcast, {doing}: {line}"
        ) from error

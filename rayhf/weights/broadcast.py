"""Weight sync by broadcast: a process group of the learner's sender and the workers of all engines.

In, at rank 0: tensors. Out, at every other rank: the buckets they were packed into, on the
receiver's device, each checked against the seal that follows its bytes. NCCL between GPUs, gloo
between CPUs; nothing else differs. torch's default group is not touched, since DeepSpeed and vLLM
each have theirs.

Synchronization: opening a group waits for no one. Joining waits for all members with gloo, and for
none with NCCL, whose members connect in the first broadcast: one that is missing shows up there. A
bucket is sent while the sender gathers and packs the next one, and received while the receiver
loads the previous one. Every wait ends after `timeout_s`: with gloo as an error here; with NCCL
torch's watchdog ends the process, and its supervisor restarts it. Like every torch process group
this one trusts the network between its members.

This is the only file that creates torch's process groups directly, read from torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import BroadcastOptions, PrefixStore, Store

from rayhf.errors import ActorLostError, DeadlineError, WeightSyncError
from rayhf.types import TensorSpec, WeightBucket
from rayhf.weights.buckets import bucket_nbytes, device_checksum, fill_bucket, format_checksum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

SEAL_BYTES = 16
"""After a bucket's tensors: its checksum, and its number and weight version."""
_MAX_BUCKETS = 1 << 20


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the members of one group connect."""

    host: str
    port: int
    members: int
    timeout_s: float


class Sender:
    """Rank 0 of one group.

    Methods raise ActorLostError where a member is gone, DeadlineError where one is too slow.
    """

    def __init__(self, host: str, *, members: int, timeout_s: float, device: torch.device) -> None:
        """Open the group; `host` is this machine's address as the other members see it."""
        timeout = timedelta(seconds=timeout_s)
        self._store = TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        self.rendezvous = Rendezvous(host, self._store.port, members, timeout_s)
        self._device = device
        self._group: ProcessGroup | None = None
        self._in_flight: tuple[Work, Tensor] | None = None
        """The last broadcast, and its bytes, which must live until it is done."""
        self._sealed: list[tuple[tuple[TensorSpec, ...], Tensor]] = []
        """Layouts and checksums of the buckets sent so far."""

    def join(self) -> None:
        """Join the group; with gloo, wait for all members."""
        self._group = _join(self._store, self.rendezvous, 0, self._device)

    def close(self) -> None:
        """Leave the group, also where other members are gone. Safe to call twice."""
        # gloo closes its connections once nothing refers to the group any more.
        self._in_flight = None
        if self._group is not None:
            self._group.abort()
        self._group = None

    def send(self, version: int, specs: tuple[TensorSpec, ...], tensors: Iterable[Tensor]) -> None:
        """Pack one bucket and start sending it; the tensors may change once this returns."""
        flat = torch.empty(
            bucket_nbytes(specs) + SEAL_BYTES, dtype=torch.uint8, device=self._device
        )
        fill_bucket(flat, specs, tensors)
        self._sealed.append((specs, _seal(flat, version, len(self._sealed))))
        self._wait()
        self._in_flight = self.transmit(flat), flat

    def transmit(self, flat: Tensor) -> Work:
        """Start the broadcast of one sealed bucket."""
        with _torch_errors("sending"):
            return _broadcast(self._group, flat)

    def finish(self) -> list[WeightBucket]:
        """Wait for the last bucket.

        Returns the buckets sent since the previous call, with checksums and without bytes.
        """
        self._wait()
        sealed = self._sealed
        self._sealed = []
        return [
            WeightBucket(tensors=specs, payload=None, checksum=format_checksum(int(checksum)))
            for specs, checksum in sealed
        ]

    def _wait(self) -> None:
        if self._in_flight is not None:
            with _torch_errors("sending"):
                self._in_flight[0].wait()
            self._in_flight = None


class Receiver:
    """One worker's membership in a group, which it joins when constructed.

    Raises ActorLostError where the sender or a member is gone, DeadlineError where one is too slow.
    """

    def __init__(self, rendezvous: Rendezvous, rank: int, device: torch.device) -> None:
        with _torch_errors("connecting to the learner"):
            timeout = timedelta(seconds=rendezvous.timeout_s)
            store = TCPStore(rendezvous.host, rendezvous.port, is_master=False, timeout=timeout)
        self._device = device
        self._group: ProcessGroup | None = _join(store, rendezvous, rank, device)

    def close(self) -> None:
        """Leave the group, also where other members are gone. Safe to call twice."""
        if self._group is not None:
            self._group.abort()
        self._group = None

    def receive(
        self, version: int, buckets: Sequence[WeightBucket]
    ) -> Iterator[tuple[WeightBucket, Tensor]]:
        """Yield each announced bucket with its checksum, and its bytes on the device.

        Raises WeightSyncError for bytes that do not match their seal.
        """
        pending = [self._start_receiving(buckets[0])]
        for number, bucket in enumerate(buckets):
            pending += [self._start_receiving(b) for b in buckets[number + 1 : number + 2]]
            work, flat = pending.pop(0)
            with _torch_errors("receiving"):
                work.wait()
            checksum = check_seal(flat, version, number, len(buckets))
            yield replace(bucket, checksum=checksum), flat[:-SEAL_BYTES]

    def _start_receiving(self, bucket: WeightBucket) -> tuple[Work, Tensor]:
        nbytes = bucket_nbytes(bucket.tensors) + SEAL_BYTES
        flat = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        with _torch_errors("receiving"):
            return _broadcast(self._group, flat), flat


def _join(store: Store, rendezvous: Rendezvous, rank: int, device: torch.device) -> ProcessGroup:
    """Return the group of one backend, without torch's wrapper around several backends.

    gloo waits for all members; NCCL connects them in the first collective.
    """
    import torch.distributed.distributed_c10d as c10d

    timeout = timedelta(seconds=rendezvous.timeout_s)
    store = PrefixStore("weights", store)
    with _torch_errors("waiting for all members"):
        if device.type == "cpu":
            gloo = c10d.ProcessGroupGloo(store, rank, rendezvous.members, timeout)
            return cast("ProcessGroup", gloo)
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timeout
        nccl = c10d.ProcessGroupNCCL(store, rank, rendezvous.members, options)
        return cast("ProcessGroup", nccl)


def _broadcast(group: ProcessGroup | None, flat: Tensor) -> Work:
    assert group is not None, "join first"
    options = BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    options.asyncOp = True  # NCCL would otherwise run on the stream that gathers, packs and loads
    return group.broadcast([flat], options)


def _stamp(version: int, number: int) -> int:
    return version * _MAX_BUCKETS + number


def _seal(flat: Tensor, version: int, number: int) -> Tensor:
    """Write the seal at the buffer's end and return the checksum, still on the device."""
    checksum = device_checksum(flat[:-SEAL_BYTES])
    seal = flat[-SEAL_BYTES:].view(torch.int64)
    seal[0] = checksum
    seal[1] = _stamp(version, number)
    return checksum


def check_seal(flat: Tensor, version: int, number: int, total: int) -> str:
    """Return the checksum of bucket `number` (from 0) of `total`.

    Raises WeightSyncError where it is not the sealed one, or the seal is another bucket's.
    """
    received = int(device_checksum(flat[:-SEAL_BYTES]))
    sent, stamp = flat[-SEAL_BYTES:].view(torch.int64).tolist()
    where = f"weight bucket {number + 1} of {total} of weights {version}"
    if received != sent:
        raise WeightSyncError(
            f"{where}: received checksum {format_checksum(received)}, "
            f"the learner sent {format_checksum(sent)}"
        )
    if stamp != _stamp(version, number):
        other = f"bucket {stamp % _MAX_BUCKETS + 1} of weights {stamp // _MAX_BUCKETS}"
        raise WeightSyncError(f"{where}: received {other} instead")
    return format_checksum(received)


@contextmanager
def _torch_errors(activity: str) -> Iterator[None]:
    """Translate torch's errors: it raises RuntimeError whatever happened to a connection."""
    try:
        yield
    except RuntimeError as error:
        line = (str(error) or type(error).__name__).splitlines()[0][:200]
        late = "timed out" in line.lower() or "timeout" in line.lower()
        raise (DeadlineError if late else ActorLostError)(
            f"weights by broadcast, {activity}: {line}"
        ) from error

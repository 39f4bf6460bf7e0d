"""A learner's weights on their way out without host memory: by broadcast, or to the engine on the
same GPU.

In: a LearnerEngine on each rank; all ranks take part, since ZeRO-3 gathers from all of them. Out:
what an engine must know before it receives (`announce`), the bytes themselves (`send`), or bytes
that lie on the device until `IpcSender.release`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rayhf.learner.engine import LearnerEngine
from rayhf.types import Probe, TensorSpec, WeightBucket
from rayhf.weights.broadcast import Sender
from rayhf.weights.buckets import device_checksum, fill, hexadecimal, lay_out, nbytes_of
from rayhf.weights.cuda_ipc import export
from rayhf.weights.export import Weight, gathered

Plan = tuple[Sequence[Sequence[Weight]], list[tuple[TensorSpec, ...]]]


def _plan(engine: LearnerEngine, dtype: str, bucket_bytes: int) -> Plan:
    """Which weights go into which bucket, and where they lie in it; known without gathering
    anything."""
    buckets, target = engine.plan(dtype, bucket_bytes)
    return buckets, [
        lay_out([(weight.name, weight.shape) for weight in bucket], target) for bucket in buckets
    ]


def announce(
    engine: LearnerEngine, dtype: str, bucket_bytes: int
) -> tuple[list[WeightBucket], Probe]:
    """The buckets that `send` will send, without bytes and checksums, and a probe to check them by.
    The same on every rank.

    Raises NumericalError where the policy does not give finite log-probs.
    """
    probe = engine.probe()
    layouts = _plan(engine, dtype, bucket_bytes)[1]
    return [WeightBucket(tensors=specs, payload=None, checksum="") for specs in layouts], probe


def send(
    engine: LearnerEngine, version: int, dtype: str, bucket_bytes: int, sender: Sender | None
) -> list[WeightBucket]:
    """Gather bucket after bucket on all ranks; the one with a `sender` broadcasts them and returns
    their checksums."""
    buckets, layouts = _plan(engine, dtype, bucket_bytes)
    whole = gathered(buckets, sharded=engine.stage == 3, rank=engine.rank)
    for specs, tensors in zip(layouts, whole, strict=True):
        if sender is not None:
            sender.send(version, specs, (tensor for _, tensor in tensors))
    return sender.finish() if sender is not None else []


class IpcSender:
    """Packed weights on this rank's device, for the engine that shares it."""

    def __init__(self) -> None:
        self._memory: list[Tensor] = []

    def publish(
        self, engine: LearnerEngine, dtype: str, bucket_bytes: int
    ) -> tuple[list[WeightBucket], Probe]:
        """Every rank's own handles to the same buckets. Takes as much of the device's memory as
        what travels."""
        self.release()
        probe = engine.probe()
        buckets, layouts = _plan(engine, dtype, bucket_bytes)
        published = []
        for specs, tensors in zip(
            layouts, gathered(buckets, sharded=engine.stage == 3, rank=0), strict=True
        ):
            flat = torch.zeros(nbytes_of(specs), dtype=torch.uint8, device=engine.device)
            fill(flat, specs, (tensor for _, tensor in tensors))
            checksum = hexadecimal(
                int(device_checksum(flat))
            )  # and so the bytes are there before anybody is told of them
            self._memory.append(flat)
            published.append(WeightBucket(tensors=specs, payload=export(flat), checksum=checksum))
        return published, probe

    def release(self) -> None:
        """Give the memory back, once the engine has loaded from it."""
        if self._memory:
            self._memory.clear()
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]

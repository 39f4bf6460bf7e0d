"""A learner's weights sent without host memory: by broadcast, or to the engine on the same GPU.

In: a LearnerEngine on each rank. Out: the buckets that an engine must know before it receives
(`announce`), the bytes themselves (`send`), or bytes that stay on the device until
`IpcSender.release`.

Synchronization: all ranks take part, since ZeRO-3 gathers from all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rayhf.learner.engine import LearnerEngine
from rayhf.types import Probe, TensorSpec, WeightBucket
from rayhf.weights.broadcast import Sender
from rayhf.weights.buckets import (
    bucket_layout,
    bucket_nbytes,
    device_checksum,
    fill_bucket,
    format_checksum,
)
from rayhf.weights.cuda_ipc import export
from rayhf.weights.export import Weight

Plan = tuple[Sequence[Sequence[Weight]], torch.dtype, list[tuple[TensorSpec, ...]]]
"""Buckets of weights, the dtype they are sent in, and their layouts."""


def _plan(engine: LearnerEngine, dtype: str, bucket_bytes: int) -> Plan:
    """Plan the buckets and their layouts without gathering anything."""
    buckets, target = engine.plan_buckets(dtype, bucket_bytes)
    layouts = [
        bucket_layout([(weight.name, weight.shape) for weight in bucket], target)
        for bucket in buckets
    ]
    return buckets, target, layouts


def announce(
    engine: LearnerEngine, dtype: str, bucket_bytes: int
) -> tuple[list[WeightBucket], Probe]:
    """Return the buckets that `send` will send, without bytes, and a probe to check them by.

    The same on every rank. Raises NumericalError where the policy's log-probs are not finite.
    """
    probe = engine.probe()
    _, _, layouts = _plan(engine, dtype, bucket_bytes)
    return [WeightBucket(tensors=specs, payload=None, checksum="") for specs in layouts], probe


def send(
    engine: LearnerEngine, version: int, dtype: str, bucket_bytes: int, sender: Sender | None
) -> list[WeightBucket]:
    """Gather the buckets one by one on all ranks; the rank with the `sender` broadcasts them.

    Returns them with their checksums there, and nothing on other ranks.
    """
    buckets, target, layouts = _plan(engine, dtype, bucket_bytes)
    gathered = engine.outgoing.gather(buckets, target, version=version, rank=engine.rank)
    for specs, tensors in zip(layouts, gathered, strict=True):
        if sender is not None:
            sender.send(version, specs, (tensor for _, tensor in tensors))
    return sender.finish() if sender is not None else []


class IpcSender:
    """Packed weights on this rank's device, for the engine that shares it."""

    def __init__(self) -> None:
        self._memory: list[Tensor] = []

    def publish(
        self, engine: LearnerEngine, dtype: str, bucket_bytes: int, *, version: int = 0
    ) -> tuple[list[WeightBucket], Probe]:
        """Return this rank's handles to the buckets, and a probe to check them by.

        Takes as much of the device's memory as the sent weights.
        """
        self.release()
        probe = engine.probe()
        buckets, target, layouts = _plan(engine, dtype, bucket_bytes)
        # Buckets that were carved out of segments which the allocator had kept would hold these
        # whole segments while the engine wakes. So they get segments of their own.
        torch.cuda.empty_cache()
        self._memory = [
            torch.empty(bucket_nbytes(specs), dtype=torch.uint8, device=engine.device)
            for specs in layouts
        ]
        gathered = engine.outgoing.gather(buckets, target, version=version, rank=0)
        published = []
        for specs, flat, tensors in zip(layouts, self._memory, gathered, strict=True):
            fill_bucket(flat, specs, (tensor for _, tensor in tensors))
            # Reading the checksum waits for the device: the bytes are there before the handle is.
            checksum = format_checksum(int(device_checksum(flat)))
            published.append(WeightBucket(tensors=specs, payload=export(flat), checksum=checksum))
        return published, probe

    def release(self) -> None:
        """Free the device memory, once the engine has loaded from it."""
        if self._memory:
            self._memory.clear()
            torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]

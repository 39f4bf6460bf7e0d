"""Parameters in flat, checksummed uint8 buckets: packed by the learner, unpacked by the engines.

In: (name, tensor) pairs. Out: a WeightBucket whose payload any transport can carry, and views into
a received payload. Every tensor starts at a multiple of 16 bytes, so a view in its own dtype needs
no copy. Bytes in host memory have XXH3 as their checksum; those that never leave a device have one
that the device itself computes (`device_checksum`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from rayhf.errors import WeightSyncError
from rayhf.models.weight_files import stored_shapes, weight_files
from rayhf.types import TensorSpec, WeightBucket

ALIGNMENT = 16
Payload = npt.NDArray[np.uint8]
_VERIFYING_THREADS = 4
_COLUMNS = 4096
_MIX = -7046029254386353131
_STIR = -4658895280553007687
"""Odd multipliers of splitmix64, signed: they spread small integers over 64 bits."""


def pack_bucket(
    named_tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> WeightBucket:
    """Copy tensors of any device and dtype into one host buffer as `dtype`."""
    (bucket,) = pack_buckets([list(named_tensors)], dtype, store=np.copy)
    return bucket


class Buffers:
    """Host memory for two buckets, one to pack and one to store; kept from sync to sync.

    New memory is zeroed by the kernel when it is first written, which takes as long as a copy.
    """

    def __init__(self) -> None:
        self._buffers = [np.empty(0, dtype=np.uint8)] * 2

    def take(self, nbytes: int) -> Payload:
        """Return the buffer that was not returned last."""
        if len(self._buffers[0]) < nbytes:
            self._buffers[0] = np.empty(nbytes, dtype=np.uint8)
        self._buffers.reverse()
        return self._buffers[1][:nbytes]


def pack_buckets(
    gathered: Iterable[Sequence[tuple[str, torch.Tensor]]],
    dtype: torch.dtype,
    *,
    store: Callable[[Payload], Any],
    buffers: Buffers | None = None,
) -> Iterator[WeightBucket]:
    """Pack each bucket's tensors, of any device and dtype, as `dtype`.

    A thread calls `store`, whose result is the bucket's payload, while the next bucket is packed.
    The bytes that `store` gets are overwritten once it returns.
    """
    buffers = buffers or Buffers()
    previous: tuple[WeightBucket, Future[Any]] | None = None
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="store weights") as thread:
        for named_tensors in gathered:
            shapes = [(name, tuple(tensor.shape)) for name, tensor in named_tensors]
            specs = bucket_layout(shapes, dtype)
            payload = buffers.take(bucket_nbytes(specs))
            fill_bucket(torch.from_numpy(payload), specs, (tensor for _, tensor in named_tensors))
            bucket = WeightBucket(tensors=specs, payload=None, checksum=checksum(payload))
            if previous is not None:
                yield _stored(*previous)
            previous = bucket, thread.submit(store, payload)
        if previous is not None:
            yield _stored(*previous)


def _stored(bucket: WeightBucket, storing: Future[Any]) -> WeightBucket:
    return replace(bucket, payload=storing.result())


def bucket_layout(
    shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype
) -> tuple[TensorSpec, ...]:
    """Return the positions in a bucket of parameters of these names and shapes."""
    specs: list[TensorSpec] = []
    for name, shape in shapes:
        spec = TensorSpec(
            name=name,
            dtype=str(dtype).removeprefix("torch."),
            shape=shape,
            offset=bucket_nbytes(specs[-1:]),
        )
        specs.append(spec)
    return tuple(specs)


def bucket_nbytes(specs: Sequence[TensorSpec]) -> int:
    """Return the bytes of a bucket that ends with the last of these tensors, padding included."""
    return specs[-1].offset + -(-_nbytes(specs[-1]) // ALIGNMENT) * ALIGNMENT if specs else 0


def fill_bucket(
    flat: torch.Tensor, specs: Sequence[TensorSpec], tensors: Iterable[torch.Tensor]
) -> None:
    """Copy the tensors to their places in `flat`, a uint8 tensor on any device.

    Padding is zero, so equal weights give equal checksums.
    """
    for spec, tensor in zip(specs, tensors, strict=True):
        _view(flat, spec).copy_(tensor.detach())
        if padding := -_nbytes(spec) % ALIGNMENT:
            end = spec.offset + _nbytes(spec)
            flat[end : end + padding].zero_()


def checksum(payload: Payload) -> str:
    """Return the XXH3 (128 bit) of the bytes.

    It protects against damage and mix-ups, not against an attacker.
    """
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(payload).data)


def device_checksum(flat: torch.Tensor) -> torch.Tensor:
    """Return a 64-bit checksum of a uint8 tensor as an int64 scalar on its device.

    The tensor's size is a multiple of 8. Nothing waits for the device. The tensor's 64-bit words
    are arranged in rows, and each is multiplied by a number of its row plus one of its column,
    modulo 2**64. That sum is odd, so a single changed word always changes the checksum; it differs
    from position to position, so swapped words do too. Like XXH3 here, it protects against damage
    and mix-ups, not against an attacker.
    """
    words = flat.view(torch.int64)
    whole = words.numel() // _COLUMNS * _COLUMNS
    rows = words[:whole].view(-1, _COLUMNS)
    rest = words[whole:]
    mixed = torch.arange(1, _COLUMNS + len(rows) + 1, device=flat.device) * _MIX
    mixed = (mixed ^ mixed >> 29) * _STIR
    mixed ^= mixed >> 32
    column = mixed[:_COLUMNS]
    row = mixed[_COLUMNS:]
    # Applying the factors to the sums of rows and columns needs two plain sums over the words and
    # no copy of them.
    total = (
        (rows.sum(1) * (row | 1)).sum()
        + (rows.sum(0) * (column & -2)).sum()
        + (rest * (column[: len(rest)] | 1)).sum()
    )
    return total + words.numel()


def format_checksum(word: int) -> str:
    """Format a device checksum."""
    return f"{word % 2**64:016x}"


def snapshot_checksum(buckets: Sequence[WeightBucket]) -> str:
    """Return the checksum over the bucket checksums, in order."""
    return xxhash.xxh3_128_hexdigest("\n".join(bucket.checksum for bucket in buckets).encode())


def verify_buckets(buckets: Sequence[WeightBucket], payloads: Sequence[Payload]) -> None:
    """Verify each bucket, in a few threads. Raises the first bucket's error."""
    with ThreadPoolExecutor(_VERIFYING_THREADS, thread_name_prefix="verify weights") as threads:
        for _ in threads.map(verify_bucket, buckets, payloads):
            pass


def verify_bucket(bucket: WeightBucket, payload: Payload) -> None:
    """Raise WeightSyncError unless `payload` is the bucket's bytes, complete and undamaged."""
    if payload.dtype != np.uint8 or payload.ndim != 1:
        raise WeightSyncError(
            f"{_label(bucket)}: payload is {payload.dtype} {payload.shape}, expected flat uint8"
        )
    end = max((spec.offset + _nbytes(spec) for spec in bucket.tensors), default=0)
    if payload.size < end:
        raise WeightSyncError(
            f"{_label(bucket)}: payload has {payload.size} bytes, its tensors need {end}"
        )
    received = checksum(payload)
    if received != bucket.checksum:
        raise WeightSyncError(
            f"{_label(bucket)}: received checksum {received}, the learner sent {bucket.checksum}"
        )


def unpack_bucket(
    bucket: WeightBucket, payload: Payload | torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, view into `payload`) in packing order.

    Read the views only: the bytes may be shared with other processes.
    """
    if not isinstance(payload, torch.Tensor):
        with warnings.catch_warnings():
            # torch warns that a transport's array is not writable; these views are never written.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            payload = torch.from_numpy(payload)
    for spec in bucket.tensors:
        yield spec.name, _view(payload, spec)


def check_complete(
    expected: Mapping[str, tuple[int, ...]], buckets: Iterable[WeightBucket]
) -> None:
    """Raise WeightSyncError unless the buckets hold each expected parameter once, in its shape."""
    received = shapes_by_name(buckets)
    missing = sorted(expected.keys() - received.keys())
    unexpected = sorted(received.keys() - expected.keys())
    if missing or unexpected:
        raise WeightSyncError(
            f"the weights do not match the model: missing {_some(missing)}; "
            f"unexpected {_some(unexpected)}"
        )
    for name, shape in received.items():
        if shape != expected[name]:
            raise WeightSyncError(
                f"parameter {name} was sent with shape {shape}, the model has {expected[name]}"
            )


def shapes_by_name(buckets: Iterable[WeightBucket]) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the buckets by name. Raises WeightSyncError where a name repeats."""
    shapes: dict[str, tuple[int, ...]] = {}
    for bucket in buckets:
        for spec in bucket.tensors:
            if spec.name in shapes:
                raise WeightSyncError(f"parameter {spec.name} was sent twice")
            shapes[spec.name] = spec.shape
    return shapes


def checkpoint_shapes(model: Path, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a Hugging Face directory's parameters (safetensors) by name.

    `tied`: the output head is the embedding; some checkpoints store it again, a learner never sends
    it.
    """
    # Old checkpoints store a buffer of the rotary embedding as well.
    shapes = {
        name: shape
        for name, shape in stored_shapes(model, key="policy.model").items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    if tied:
        shapes.pop("lm_head.weight", None)
    return shapes


def checkpoint_tensors(model: Path, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a Hugging Face directory's parameters of these names.

    Files are mapped: bytes are read when a tensor is copied.
    """
    from safetensors import safe_open

    for file in weight_files(model, key="policy.model"):
        with safe_open(file, framework="pt") as handle:
            stored = handle.keys()
            for name in stored:
                if name in names:
                    yield name, handle.get_tensor(name)


def _nbytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * _dtype(spec).itemsize


def _dtype(spec: TensorSpec) -> torch.dtype:
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightSyncError(
            f"parameter {spec.name} has dtype {spec.dtype!r}, expected a torch dtype such as "
            "'float32'"
        )
    return dtype


def _view(flat: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    return flat[spec.offset : spec.offset + _nbytes(spec)].view(_dtype(spec)).view(spec.shape)


def _label(bucket: WeightBucket) -> str:
    names = [spec.name for spec in bucket.tensors]
    return (
        f"weight bucket {names[0]} .. {names[-1]} ({len(names)} tensors)"
        if names
        else "empty weight bucket"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown or "none"

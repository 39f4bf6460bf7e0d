"""Parameters in flat, checksummed uint8 buckets: packed by the learner, checked and unpacked by
every rollout engine.

In: (name, tensor) pairs. Out: a WeightBucket whose payload any transport can carry, and views into
a received payload. Every tensor starts at a multiple of 16 bytes, so a view in its own dtype needs
no copy. Bytes in host memory have XXH3 as their checksum; those that never leave a device have one
that the device itself computes (`device_checksum`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from rayhf.errors import ConfigError, WeightSyncError
from rayhf.types import TensorSpec, WeightBucket

ALIGNMENT = 16
Payload = npt.NDArray[np.uint8]
_COLUMNS = 4096
_MIX, _STIR = -7046029254386353131, -4658895280553007687
"""Odd numbers (of splitmix64, signed) that spread small ones over 64 bits."""


def pack_bucket(
    named_tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> WeightBucket:
    """Copy tensors (on any device, of any dtype) into one buffer as `dtype`. Padding is zero, so
    equal weights give equal checksums."""
    tensors = list(named_tensors)
    specs = lay_out([(name, tuple(tensor.shape)) for name, tensor in tensors], dtype)
    payload = np.zeros(nbytes_of(specs), dtype=np.uint8)
    fill(torch.from_numpy(payload), specs, (tensor for _, tensor in tensors))
    return WeightBucket(tensors=specs, payload=payload, checksum=checksum(payload))


def lay_out(
    shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: torch.dtype
) -> tuple[TensorSpec, ...]:
    """Where parameters of these names and shapes lie in a bucket."""
    specs: list[TensorSpec] = []
    for name, shape in shapes:
        spec = TensorSpec(
            name=name,
            dtype=str(dtype).removeprefix("torch."),
            shape=shape,
            offset=nbytes_of(specs[-1:]),
        )
        specs.append(spec)
    return tuple(specs)


def nbytes_of(specs: Sequence[TensorSpec]) -> int:
    """Bytes of a bucket that ends with the last of these tensors, padding included."""
    return specs[-1].offset + -(-_nbytes(specs[-1]) // ALIGNMENT) * ALIGNMENT if specs else 0


def fill(flat: torch.Tensor, specs: Sequence[TensorSpec], tensors: Iterable[torch.Tensor]) -> None:
    """Copy the tensors to their places in `flat`, a uint8 tensor on any device."""
    for spec, tensor in zip(specs, tensors, strict=True):
        _view(flat, spec).copy_(tensor.detach())


def checksum(payload: Payload) -> str:
    """XXH3 (128 bit) of the bytes: it guards against damage and mix-ups, not against an
    attacker."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(payload).data)


def device_checksum(flat: torch.Tensor) -> torch.Tensor:
    """64 bits of a uint8 tensor, whose size is a multiple of 8, as an int64 scalar on its device;
    nothing is waited for.

    Its 64-bit words stand in rows, and each is multiplied by a number of its row's plus one of its
    column's, modulo 2**64. The sum is odd, so one word that changed always shows; it differs from
    place to place, so words that changed places show, too. Like the other checksum it guards
    against damage and mix-ups, not against an attacker.
    """
    words = flat.view(torch.int64)
    whole = words.numel() // _COLUMNS * _COLUMNS
    rows, rest = words[:whole].view(-1, _COLUMNS), words[whole:]
    mixed = torch.arange(1, _COLUMNS + len(rows) + 1, device=flat.device) * _MIX
    mixed = (mixed ^ mixed >> 29) * _STIR
    mixed ^= mixed >> 32
    column, row = mixed[:_COLUMNS], mixed[_COLUMNS:]
    # Two plain sums over the bytes and no copy of them: the factors are applied to rows' and
    # columns' sums.
    total = (
        (rows.sum(1) * (row | 1)).sum()
        + (rows.sum(0) * (column & -2)).sum()
        + (rest * (column[: len(rest)] | 1)).sum()
    )
    return total + words.numel()


def hexadecimal(word: int) -> str:
    """A device's checksum as text."""
    return f"{word % 2**64:016x}"


def snapshot_checksum(buckets: Sequence[WeightBucket]) -> str:
    """Over the bucket checksums, in order."""
    return xxhash.xxh3_128_hexdigest("\n".join(bucket.checksum for bucket in buckets).encode())


def verify_bucket(bucket: WeightBucket, payload: Payload) -> None:
    """Raise WeightSyncError unless `payload` is the bucket's bytes, whole and undamaged."""
    if payload.dtype != np.uint8 or payload.ndim != 1:
        raise WeightSyncError(
            f"{_label(bucket)}: payload is {payload.dtype} {payload.shape}, expected flat uint8"
        )
    end = max((spec.offset + _nbytes(spec) for spec in bucket.tensors), default=0)
    if payload.size < end:
        raise WeightSyncError(
            f"{_label(bucket)}: payload has {payload.size} bytes, its tensors need {end}"
        )
    found = checksum(payload)
    if found != bucket.checksum:
        raise WeightSyncError(
            f"{_label(bucket)}: received checksum {found}, the learner sent {bucket.checksum}"
        )


def unpack_bucket(
    bucket: WeightBucket, payload: Payload | torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Views into `payload`, in the order they were packed. Read only: the bytes may be shared with
    other processes."""
    if not isinstance(payload, torch.Tensor):
        with warnings.catch_warnings():
            # A transport's array is not writable and torch warns about it; nobody writes to these
            # views.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            payload = torch.from_numpy(payload)
    for spec in bucket.tensors:
        yield spec.name, _view(payload, spec)


def check_complete(
    expected: Mapping[str, tuple[int, ...]], buckets: Iterable[WeightBucket]
) -> None:
    """Raise WeightSyncError unless the buckets hold exactly the expected parameters, once each and
    in shape."""
    received = sent_shapes(buckets)
    missing, unexpected = (
        sorted(expected.keys() - received.keys()),
        sorted(received.keys() - expected.keys()),
    )
    if missing or unexpected:
        raise WeightSyncError(
            f"the weights do not match the model: missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    for name, shape in received.items():
        if shape != expected[name]:
            raise WeightSyncError(
                f"parameter {name} was sent with shape {shape}, the model has {expected[name]}"
            )


def sent_shapes(buckets: Iterable[WeightBucket]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the buckets hold. Raises WeightSyncError where something is there
    twice."""
    shapes: dict[str, tuple[int, ...]] = {}
    for bucket in buckets:
        for spec in bucket.tensors:
            if spec.name in shapes:
                raise WeightSyncError(f"parameter {spec.name} was sent twice")
            shapes[spec.name] = spec.shape
    return shapes


def checkpoint_shapes(model: Path, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of a Hugging Face directory (safetensors).

    `tied`: the output head is the embedding; some checkpoints store it again, a learner never sends
    it.
    """
    from safetensors import safe_open

    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"policy.model: no *.safetensors in {model}; save the model with save_pretrained()"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="numpy") as handle:
            names = handle.keys()  # the handle itself is not iterable
            for name in names:
                # Old checkpoints store this buffer of the rotary embedding; it is no parameter.
                if not name.endswith("rotary_emb.inv_freq"):
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
    if tied:
        shapes.pop("lm_head.weight", None)
    return shapes


def checkpoint_tensors(model: Path, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of these names of a Hugging Face directory. Files are mapped: bytes are read
    when they are copied."""
    from safetensors import safe_open

    for file in sorted(model.glob("*.safetensors")):
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
            f"parameter {spec.name} has dtype {spec.dtype!r}, expected a torch dtype such as 'float32'"
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

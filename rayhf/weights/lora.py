"""LoRA on its way: of an adapted parameter only two factors travel, and who has the base adds their
product to it.

In: NAME.lora_A and NAME.lora_B from the learner (LoRA's scale is in them already), and the model
directory that both started from. Out: whole parameters. Learner and engine merge with the same
function, so they get the same bits: on CPU always, on a GPU as far as its matrix products have
them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rayhf.errors import WeightSyncError
from rayhf.types import WeightBucket
from rayhf.weights.buckets import checkpoint_tensors, sent_shapes

A, B = ".lora_A", ".lora_B"


def is_factor(name: str) -> bool:
    return name.endswith((A, B))


def merged(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """base + b @ a, summed in float32, in the dtype of `base`."""
    with _one_thread():
        return (base.float() + b.float() @ a.float()).to(base.dtype)


@contextmanager
def _one_thread() -> Iterator[None]:
    """On CPU several threads cut a product in ways that depend on their number, and so do its last
    bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def with_base(
    directory: Path, names: Collection[str], factors: Mapping[str, Tensor], *, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The directory's parameters of these names, adapted where there are factors; in the factors'
    dtype, the learner's."""
    dtype = next(iter(factors.values())).dtype
    for name, stored in checkpoint_tensors(directory, names):
        base = stored.to(device).to(dtype)
        yield (
            name,
            merged(base, factors[name + A], factors[name + B]) if name + A in factors else base,
        )


def check_adapters(
    expected: Mapping[str, tuple[int, ...]], buckets: Iterable[WeightBucket]
) -> None:
    """Raise WeightSyncError unless what the buckets hold, factors and whole parameters, belongs to
    the model and fits it."""
    sent = sent_shapes(buckets)
    for name in {name.removesuffix(A).removesuffix(B) for name in sent}:
        a, b = sent.get(name + A, ()), sent.get(name + B, ())
        factors = len(a) == len(b) == 2 and a[0] == b[1]
        shape = sent.get(name, (*b[:1], *a[1:]) if factors else None)
        if shape is None:
            raise WeightSyncError(
                f"adapter of {name}: factors of shapes {b or 'none'} and {a or 'none'} have no product"
            )
        if shape != expected.get(name):
            raise WeightSyncError(
                f"parameter {name} was sent with shape {shape}, the model has {expected.get(name)}"
            )

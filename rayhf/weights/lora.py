"""Weight sync with LoRA: only an adapter's two factors are sent, and the receiver merges them.

In: NAME.lora_A and NAME.lora_B from the learner (LoRA's scale is included), and the model directory
that learner and engine both started from. Out: whole parameters. Learner and engine merge with the
same function, so they get the same bits: on CPU always, on a GPU as far as its matrix products are
reproducible.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rayhf.errors import WeightSyncError
from rayhf.types import WeightBucket
from rayhf.weights.buckets import checkpoint_tensors, shapes_by_name

LORA_A = ".lora_A"
LORA_B = ".lora_B"


def is_factor(name: str) -> bool:
    return name.endswith((LORA_A, LORA_B))


def merge(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return base + b @ a, summed in float32, in the dtype of `base`."""
    with _one_thread():
        return (base.float() + b.float() @ a.float()).to(base.dtype)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: on CPU the last bits of a product depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def merge_with_directory(
    directory: Path, names: Collection[str], factors: Mapping[str, Tensor], *, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield the directory's parameters of these names, merged with their factors.

    Parameters without factors are yielded as stored. All have the factors' dtype, the learner's.
    """
    dtype = next(iter(factors.values())).dtype
    for name, stored in checkpoint_tensors(directory, names):
        weight = stored.to(device).to(dtype)
        if name + LORA_A in factors:
            weight = merge(weight, factors[name + LORA_A], factors[name + LORA_B])
        yield name, weight


def check_adapters(
    expected: Mapping[str, tuple[int, ...]], buckets: Iterable[WeightBucket]
) -> None:
    """Check that the factors and whole parameters in the buckets belong to the model and fit it.

    Raises WeightSyncError otherwise.
    """
    sent = shapes_by_name(buckets)
    for name in {name.removesuffix(LORA_A).removesuffix(LORA_B) for name in sent}:
        a = sent.get(name + LORA_A, ())
        b = sent.get(name + LORA_B, ())
        have_product = len(a) == len(b) == 2 and a[0] == b[1]
        shape = sent.get(name, (*b[:1], *a[1:]) if have_product else None)
        if shape is None:
            raise WeightSyncError(
                f"adapter of {name}: factors of shapes {b or 'none'} and {a or 'none'} have no "
                "product"
            )
        if shape != expected.get(name):
            raise WeightSyncError(
                f"parameter {name} was sent with shape {shape}, the model has {expected.get(name)}"
            )

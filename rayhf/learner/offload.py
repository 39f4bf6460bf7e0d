"""A learner's tensors moved out of GPU memory and back, for a GPU that roles share in turn.

Only storages are emptied and refilled; every tensor object stays where it is. DeepSpeed's many
views of the same memory therefore remain valid at every ZeRO stage, and not a bit is lost.
(DeepSpeed's own offload_states requires its FusedAdam at stage 3 and does not cover stage 0.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rayhf.weights.deepspeed_internals import DeepSpeedEngine, device_storages

_SMALLEST_BLOCK = 1 << 20
"""Smallest block of host memory, in bytes."""


class Offloader:
    """The device memory of a DeepSpeed engine, on its device or in host memory."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._offloaded: list[tuple[torch.UntypedStorage, int, Sequence[Tensor]]] = []
        """Emptied storages, their sizes, and their bytes in blocks of host memory, which is pinned
        where the device is a GPU."""

    def offload(self) -> None:
        """Move parameters, masters, moments and buffers to host memory, between steps.

        Does nothing where they are there already.
        """
        if self._offloaded:
            return
        for storage in device_storages(self._engine):
            on_gpu = storage.device.type == "cuda"
            blocks = [
                torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
                for size in block_sizes(storage.nbytes())
            ]
            for block, part in zip(blocks, _parts(storage, blocks), strict=True):
                block[: len(part)].copy_(part, non_blocking=True)
            self._offloaded.append((storage, storage.nbytes(), blocks))
        self._synchronize()
        for storage, _, _ in self._offloaded:
            storage.resize_(0)
        if self._engine.device.type == "cuda":
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Move everything back to the device; does nothing where it is there.

        Raises torch's OutOfMemoryError where the device has too little free memory.
        """
        while self._offloaded:
            storage, nbytes, blocks = self._offloaded[-1]
            storage.resize_(nbytes)
            for block, part in zip(blocks, _parts(storage, blocks), strict=True):
                part.copy_(block[: len(part)], non_blocking=True)
            self._offloaded.pop()
        self._synchronize()

    def _synchronize(self) -> None:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize()


def block_sizes(nbytes: int) -> list[int]:
    """Return sizes of blocks that together hold `nbytes`, largest first, all powers of two.

    torch rounds each piece of pinned memory up to a power of two: in one piece, half of it could be
    wasted.
    """
    sizes = []
    while nbytes > 0:
        size = max(_SMALLEST_BLOCK, 1 << (nbytes.bit_length() - 1))
        sizes.append(size)
        nbytes -= size
    return sizes


def _parts(storage: torch.UntypedStorage, blocks: Sequence[Tensor]) -> list[Tensor]:
    """Return a storage's bytes, cut as the blocks hold them; the last part may be shorter."""
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    sizes = [len(block) for block in blocks[:-1]]
    return list(torch.split(flat, [*sizes, len(flat) - sum(sizes)]))

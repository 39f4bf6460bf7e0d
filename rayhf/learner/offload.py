"""A learner's tensors moved out of GPU memory and back, for a GPU that roles share in turn.

Only storages are emptied and refilled; every tensor object stays where it is. DeepSpeed's many
views of the same memory therefore remain valid at every ZeRO stage, and not a bit is lost.
(DeepSpeed's own offload_states requires its FusedAdam at stage 3 and does not cover stage 0.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayhf.weights.deepspeed_internals import DeepSpeedEngine, device_storages


class Offloader:
    """The device memory of a DeepSpeed engine, on its device or in host memory."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._offloaded: list[tuple[torch.UntypedStorage, Tensor]] = []
        """Emptied storages and their bytes, in pinned host memory where the device is a GPU."""

    def offload(self) -> None:
        """Move parameters, masters, moments and buffers to host memory, between steps.

        Does nothing where they are there already.
        """
        if self._offloaded:
            return
        for storage in device_storages(self._engine):
            on_gpu = storage.device.type == "cuda"
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_gpu)
            host.copy_(_bytes(storage), non_blocking=True)
            self._offloaded.append((storage, host))
        self._synchronize()
        for storage, _ in self._offloaded:
            storage.resize_(0)
        if self._engine.device.type == "cuda":
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Move everything back to the device; does nothing where it is there.

        Raises torch's OutOfMemoryError where the device has too little free memory.
        """
        while self._offloaded:
            storage, host = self._offloaded[-1]
            storage.resize_(host.nbytes)
            _bytes(storage).copy_(host, non_blocking=True)
            self._offloaded.pop()
        self._synchronize()

    def _synchronize(self) -> None:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

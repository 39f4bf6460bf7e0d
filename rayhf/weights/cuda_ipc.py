"""Weights that stay on their GPU: an engine on the learner's GPU loads from the learner's memory.

In: a bucket's bytes on the learner's device. Out: a picklable handle, and the same bytes in another
process. CUDA only. The learner keeps the bytes until every engine has confirmed; where an engine
crashes before it opened them, they stay allocated until the learner's process ends.

This is the only file that uses torch.multiprocessing.reductions, read from torch 2.13;
tests/unit/test_weights_cuda_ipc.py fails where its signature changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rayhf.errors import WeightSyncError

DEVICE_ARGUMENT = 6
"""Position among the arguments of `rebuild_cuda_tensor` of the device's index, which each process
counts for itself."""


@dataclass(frozen=True, slots=True)
class IpcExport:
    """A handle to another process's GPU memory."""

    gpu: str
    """UUID of the GPU."""
    arguments: tuple[object, ...]
    """Arguments of torch's `rebuild_cuda_tensor`."""


def export(flat: Tensor) -> IpcExport:
    """Export a tensor; call it once for each process that will open the handle."""
    from torch.multiprocessing.reductions import reduce_tensor

    reduced = reduce_tensor(flat)  # type: ignore[no-untyped-call]
    return IpcExport(_gpu_uuid(flat.device), reduced[1])


def open_export(handle: IpcExport, device: torch.device) -> Tensor:
    """Return the exported tensor without copying it. Raises WeightSyncError on another GPU."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    gpu = _gpu_uuid(device)
    if gpu != handle.gpu:
        raise WeightSyncError(
            f"the weights are on GPU {handle.gpu}, this engine is on GPU {gpu}: cuda_ipc needs "
            "both on one"
        )
    arguments = list(handle.arguments)
    arguments[DEVICE_ARGUMENT] = device.index or 0
    tensor: Tensor = rebuild_cuda_tensor(*arguments)  # type: ignore[no-untyped-call]
    return tensor


def _gpu_uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)

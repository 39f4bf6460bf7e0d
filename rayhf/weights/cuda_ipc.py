"""Weights that stay on their GPU: the engine that shares it opens the learner's memory and loads
from there. CUDA only.

In: a bucket's bytes on the learner's device. Out: a handle that may travel by any way, and the same
bytes in another process. The learner keeps them until every engine has confirmed; an engine that
was lost before it opened them leaves them taken until the learner's process ends. Written against
torch 2.13's `torch.multiprocessing.reductions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayhf.errors import WeightSyncError

_DEVICE_ARGUMENT = 6
"""Of `rebuild_cuda_tensor`: the device's index, which each process counts for itself."""


@dataclass(frozen=True, slots=True)
class IpcExport:
    """Somebody else's memory."""

    gpu: str
    arguments: tuple[Any, ...]


def export(flat: Tensor) -> IpcExport:
    """Once for each process that will open it."""
    from torch.multiprocessing.reductions import reduce_tensor

    return IpcExport(_identity(flat.device), reduce_tensor(flat)[1])  # type: ignore[no-untyped-call]


def opened(handle: IpcExport, device: torch.device) -> Tensor:
    """The bytes, where they are. Raises WeightSyncError on another GPU."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    here = _identity(device)
    if here != handle.gpu:
        raise WeightSyncError(
            f"the weights lie on GPU {handle.gpu}, this engine is on GPU {here}: cuda_ipc needs both on one"
        )
    arguments = list(handle.arguments)
    arguments[_DEVICE_ARGUMENT] = device.index or 0
    tensor: Tensor = rebuild_cuda_tensor(*arguments)  # type: ignore[no-untyped-call]
    return tensor


def _identity(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)

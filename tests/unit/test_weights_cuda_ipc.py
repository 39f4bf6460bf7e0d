"""torch's internals that CUDA IPC relies on; tests/gpu/test_cuda_ipc.py runs them."""

from __future__ import annotations

import inspect

from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from rayhf.weights.cuda_ipc import DEVICE_ARGUMENT


def test_replaced_argument_is_the_device() -> None:
    names = list(inspect.signature(rebuild_cuda_tensor).parameters)
    assert names[DEVICE_ARGUMENT] == "storage_device"
    assert list(inspect.signature(reduce_tensor).parameters) == ["tensor"]

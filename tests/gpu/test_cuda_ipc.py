"""Another process's memory on the same GPU.

Not run on a GPU yet; written against torch 2.13.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from rayhf.errors import WeightSyncError
from rayhf.weights.buckets import device_checksum
from rayhf.weights.cuda_ipc import IpcExport, export, open_export

pytestmark = pytest.mark.gpu


def checksum(handle: IpcExport) -> int:
    return int(device_checksum(open_export(handle, torch.device("cuda:0"))))


def test_another_process_reads_exported_memory_and_frees_it() -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as neighbor:
        for _ in range(3):
            flat = torch.randint(0, 256, (256 << 20,), dtype=torch.uint8, device="cuda")
            assert neighbor.submit(checksum, export(flat)).result(120) == int(device_checksum(flat))
            del flat
            torch.cuda.ipc_collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < 256 << 20


def test_another_gpus_memory_is_refused() -> None:
    with pytest.raises(WeightSyncError, match="this engine is on GPU"):
        open_export(IpcExport("GPU-elsewhere", ()), torch.device("cuda:0"))

"""Environment variables of a process that runs models.

In: the device, a number of threads, and whether vLLM runs in it. Out: variables for a Ray
runtime_env or os.environ, to be set before the process imports anything.
"""

from __future__ import annotations

import os

from rayhf.config.import_path import USER_FOLDER, user_folder
from rayhf.models.hub import OFFLINE
from rayhf.rollout.env import Device, engine_env, openmp_env


def process_env(device: Device, threads: int | None, *, vllm: bool) -> dict[str, str]:
    """Return the variables of an actor's or a service's process.

    Args:
        device: of its models.
        threads: CPU threads; None leaves them to the libraries, and in an actor to Ray, which
            allows one thread for each CPU that the actor reserves.
        vllm: the process runs a vLLM engine.
    """
    env = {
        USER_FOLDER: user_folder(),
        # Models are local directories: no process looks anything up, except for `obtain`.
        "HF_HUB_OFFLINE": "1",
        OFFLINE: os.environ.get("HF_HUB_OFFLINE", "0"),
        # A tokenizer's threads would compete with the model's.
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    if endpoint := os.environ.get("HF_ENDPOINT"):
        env["HF_ENDPOINT"] = endpoint
    if device == "cpu":
        env["DS_ACCELERATOR"] = "cpu"
        # Large pages for malloc: a weight update allocates each layer anew, and half of its time
        # would go into page faults.
        env["GLIBC_TUNABLES"] = os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
        env |= openmp_env()
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    if vllm:
        env |= engine_env(device, threads)
    return env

"""The environment of an engine's process, to be set before vLLM is imported (vLLM reads most of it
at import).

In: the device and a thread count. Out: variables for a Ray runtime_env or os.environ. Imports
neither vLLM nor torch.
"""

from __future__ import annotations

import os
from typing import Literal

from rayhf.errors import ConfigError

Device = Literal["cpu", "gpu"]


def engine_env(device: Device, threads: int | None = None) -> dict[str, str]:
    """Variables for a process that will build a RolloutEngine on `device` with `threads` CPU
    threads (default: all).

    The log level stays as the caller's environment has it; vLLM is quiet otherwise, its errors
    reach us as exceptions.
    """
    env = {
        # Engine and worker live in this process: no children to orphan, no second import of torch,
        # and weights go in without serialisation.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        # Models are directories; nothing is looked up on a hub.
        "HF_HUB_OFFLINE": "1",
    }
    if device == "cpu":
        # Eager mode has one torch.compile left (ranks of log-probs); it costs seconds at the first
        # request.
        env["TORCHDYNAMO_DISABLE"] = "1"
        # vLLM pins threads to cores by default; on a shared machine that puts every engine on the
        # same cores.
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        env["OMP_NUM_THREADS"] = str(threads or len(os.sched_getaffinity(0)))
    return env


def check_env(device: Device) -> None:
    """Raise ConfigError where this process lacks a variable whose absence vLLM would not report."""
    fixed = ("VLLM_ENABLE_V1_MULTIPROCESSING", "TORCHDYNAMO_DISABLE", "VLLM_CPU_OMP_THREADS_BIND")
    for name, wanted in engine_env(device).items():
        if name in fixed and os.environ.get(name) != wanted:
            raise ConfigError(
                f"environment: {name} is {os.environ.get(name)!r}, a rollout engine on {device} needs {wanted!r}; "
                "set rayhf.rollout.env.engine_env() before vllm is imported"
            )

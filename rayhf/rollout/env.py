"""The environment of an engine's process, to be set before vLLM is imported.

vLLM reads most of it at import. In: the device and a thread count. Out: variables for a Ray
runtime_env or os.environ. Imports neither vLLM nor torch.
"""

from __future__ import annotations

import os
from typing import Literal

from rayhf.errors import ConfigError

Device = Literal["cpu", "gpu"]


def engine_env(device: Device, threads: int | None = None) -> dict[str, str]:
    """Return the variables for a process that will build a RolloutEngine on `device`.

    `threads`: CPU threads, default all. The log level stays as the caller's environment sets it;
    otherwise vLLM logs errors only, which rayhf gets as exceptions anyway.
    """
    env = {
        # Engine and worker run in this process: no child processes to orphan, no second import of
        # torch, and weights are passed without serialization.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        # Models are directories; nothing is looked up on a hub.
        "HF_HUB_OFFLINE": "1",
    }
    if device == "cpu":
        # Eager mode still uses one torch.compile (ranks of log-probs); it costs seconds at the
        # first request.
        env["TORCHDYNAMO_DISABLE"] = "1"
        # vLLM pins threads to cores by default; on a shared machine that puts every engine on the
        # same cores.
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        env["OMP_NUM_THREADS"] = str(threads or len(os.sched_getaffinity(0)))
    return env


def check_env(device: Device) -> None:
    """Raise ConfigError where this process lacks a variable whose absence vLLM would not report."""
    required = (
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "TORCHDYNAMO_DISABLE",
        "VLLM_CPU_OMP_THREADS_BIND",
    )
    for name, value in engine_env(device).items():
        if name in required and os.environ.get(name) != value:
            raise ConfigError(
                f"environment: {name} is {os.environ.get(name)!r}, a rollout engine on {device} "
                f"needs {value!r}; set rayhf.rollout.env.engine_env() before vllm is imported"
            )

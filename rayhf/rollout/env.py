"""The environment of an engine's process, to be set before vLLM is imported.

vLLM reads most of it at import. In: the device and a thread count. Out: variables for a Ray
runtime_env or os.environ. Imports neither vLLM nor torch.
"""

from __future__ import annotations

import os
from typing import Literal

from rayhf.errors import ConfigError

Device = Literal["cpu", "gpu"]


def openmp_env() -> dict[str, str]:
    """Return the variables that keep OpenMP's threads from spinning for long.

    To be set before torch is imported. By default a thread that waits for the others of its team
    spins for about a millisecond. Where other processes use the cores, too, the one that it waits
    for then does not run: two runs on two cores, each training a small model with two threads,
    took more than ten times as long as one. With 5,000 turns they took 3.6 times as long, without
    any 1.9 times; one run alone, 1.0 and 1.4 times. No bit of a result depends on it.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return {}  # inherited
    return {"GOMP_SPINCOUNT": "5000"}


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
        env |= openmp_env()
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

"""Settings of a vLLM engine, and what it says where it refuses them.

In: the section `rollout` and the device. Out: vLLM's LLM, or an error of rayhf's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm import LLM

from rayhf.config.schema import RolloutConfig
from rayhf.errors import ConfigError, GpuMemoryError, clean_line
from rayhf.rollout import vllm_internals
from rayhf.rollout.env import Device
from rayhf.rollout.vllm_worker import BACKEND

CPU_KV_CACHE_GIB = 0.25
CPU_BATCHED_TOKENS = 16384
_UNCHECKED_FRACTION = 0.01
"""A fraction of GPU memory so small that vLLM's check at the start passes."""


def build_engine(
    model: Path,
    config: RolloutConfig,
    *,
    dtype: str,
    max_length: int,
    seed: int,
    device: Device,
    sleep_mode: bool,
    scaled_logprobs: bool,
) -> LLM:
    """Start vLLM. Raises ConfigError or GpuMemoryError, as RolloutEngine does."""
    kv_cache_gib = config.kv_cache_gib or (CPU_KV_CACHE_GIB if device == "cpu" else None)
    eager = config.enforce_eager if config.enforce_eager is not None else device == "cpu"
    if device == "cpu" and not eager:
        raise ConfigError("rollout.enforce_eager: false needs a GPU; on CPU leave it out")
    settings: dict[str, Any] = {
        "dtype": dtype,
        # A model directory is data: no code of its own, no pickled weights.
        "trust_remote_code": False,
        "load_format": "safetensors",
        "max_model_len": max_length,
        "max_num_seqs": config.max_num_seqs,
        "enforce_eager": eager,
        "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
        "seed": seed,
        "worker_extension_cls": "rayhf.rollout.vllm_worker.WorkerExtension",
        "weight_transfer_config": {"backend": BACKEND},
        # Raw: of the whole vocabulary at temperature 1, as the learner computes them. Processed
        # ones have the temperature, but top-k and top-p renormalize them too.
        "logprobs_mode": "processed_logprobs" if scaled_logprobs else "raw_logprobs",
        # Sampling is set by the request alone, not by defaults that ship with a checkpoint.
        "generation_config": "vllm",
        "enable_prefix_caching": config.prefix_caching,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if device == "cpu":
        settings |= _cpu_settings(max_length)
    else:
        settings |= _gpu_settings(config, kv_cache_gib, sleep_mode=sleep_mode)
    if config.tensor_parallel > 1:
        # By default vLLM would detect Ray's placement group and request workers in a bundle that
        # this actor fills.
        settings["tensor_parallel_size"] = config.tensor_parallel
        settings["distributed_executor_backend"] = "mp"
    try:
        return LLM(str(model), **settings)
    except (ValueError, AssertionError, torch.OutOfMemoryError) as error:
        # A cache of a given size, as on CPU, is too small whenever it is tried.
        if kv_cache_gib is None and vllm_internals.is_memory_shortage(error):
            raise GpuMemoryError(f"vLLM does not start: {clean_line(str(error))}") from error
        if not isinstance(error, ValueError):
            raise
        raise ConfigError(
            f"vLLM refuses {model} with the settings of section rollout: {error}"
        ) from error


def _cpu_settings(max_length: int) -> dict[str, Any]:
    # A prompt that is prefilled in parts makes vLLM 0.32 rewind the generators of seeded requests,
    # which CPU generators cannot: the engine would crash. So prompts enter whole, and a step must
    # have room for the longest. Prefixes are cached in whole blocks: 32 tokens is the smallest size
    # that the CPU kernels support, as fast as vLLM's 128.
    return {
        "block_size": 32,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_length, CPU_BATCHED_TOKENS),
    }


def _gpu_settings(
    config: RolloutConfig, kv_cache_gib: float | None, *, sleep_mode: bool
) -> dict[str, Any]:
    return {
        # With a cache of a given size this decides nothing, but vLLM would still require this
        # fraction to be free at the start.
        "gpu_memory_utilization": config.memory_fraction
        if kv_cache_gib is None
        else _UNCHECKED_FRACTION,
        "enable_sleep_mode": sleep_mode,
    }

"""Completions from a vLLM engine in this process, for commands that need no cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rayhf.config.schema import Dtype, RolloutConfig
from rayhf.rollout.env import Device, engine_env
from rayhf.types import Completion, GenerateRequest


def generate_here(
    model: Path,
    requests: Sequence[GenerateRequest],
    *,
    rollout: RolloutConfig,
    dtype: Dtype,
    max_length: int,
    device: Device,
    stop_token_ids: Sequence[int] = (),
) -> list[tuple[Completion, ...]]:
    """Start an engine with the model, complete the requests, and stop it.

    Args:
        model: Hugging Face model directory.
        requests: each has its own sampling parameters and seeds.
        rollout: the engine's settings.
        dtype: of weights and computation.
        max_length: prompt plus response, in tokens.
        device: "cpu" or "gpu".
        stop_token_ids: tokens that end a completion, besides those of the directory.

    Raises ConfigError where vLLM refuses the model or a request does not fit.
    """
    os.environ |= engine_env(device, rollout.threads)
    from rayhf.rollout.engine import RolloutEngine

    engine = RolloutEngine(
        model,
        rollout,
        dtype=dtype,
        max_length=max_length,
        seed=0,  # of vLLM itself; requests have their own
        device=device,
        stop_token_ids=stop_token_ids,
    )
    try:
        return engine.generate(requests, version=0)
    finally:
        engine.close()

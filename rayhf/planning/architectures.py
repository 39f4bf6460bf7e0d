"""Architectures of a campaign's models: refuse what does not work, warn of what was not tested."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rayhf.algorithms.base import Algorithm, TrainsCritic
from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError
from rayhf.models.architectures import check_architecture, check_critic, check_packing
from rayhf.models.quantized import check_quantize
from rayhf.models.source import model_length, read_model_config


def check_architectures(
    config: CampaignConfig, algorithm: Algorithm, models: Mapping[str, Path]
) -> list[str]:
    """Return a warning for each untested architecture, and how the learner feeds each model's rows.

    `models`: directories by config key. Raises ConfigError for a model that does not work, or not
    as a critic, or not with policy.lora.quantize.
    """
    policy = read_model_config(models["policy.model"], key="policy.model")
    length = config.policy.max_length or model_length(policy)
    attention = "FlexAttention" if config.cluster.device == "gpu" else "SDPA in blocks"
    notes = []
    for key, directory in models.items():
        settings = read_model_config(directory, key=key)
        warning = check_architecture(settings, key=key, max_length=length)
        if warning is not None:
            notes.append(f"warning: {warning}")
        fed = check_packing(settings, config.learner, key=key)
        notes.append(fed if "padded" in fed else f"{fed} ({attention})")
    if isinstance(algorithm, TrainsCritic):
        key = "learner.critic_model" if "learner.critic_model" in models else "policy.model"
        check_critic(read_model_config(models[key], key=key), key=key)
    if config.policy.lora and config.policy.lora.quantize:
        check_quantize(config, policy)
        for key in models:
            if key.startswith("algorithm."):
                raise ConfigError(
                    f"{key}: with policy.lora.quantize all policies start from policy.model; leave "
                    "it out"
                )
    return notes

"""Refuse settings of the reference and of streaming that have no effect, or cannot work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rayhf.algorithms.base import (
    Algorithm,
    TrainsCritic,
    generates,
    needs_frozen_reference,
    population_of,
    reference_top_k,
)
from rayhf.algorithms.streaming import streams_reference, streams_values
from rayhf.config.algorithms import EmaReference
from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError
from rayhf.models.directory import vocabulary_size
from rayhf.models.source import read_model_config


def check_reference(config: CampaignConfig, algorithm: Algorithm, total_steps: int) -> None:
    """Refuse a reference that would never move, is not used, or cannot be placed.

    Also values that cannot be streamed. Raises ConfigError.
    """
    _check_values(config, algorithm)
    _check_ranks(config)
    _check_population(config, algorithm)
    schedule = algorithm.reference
    if isinstance(schedule, EmaReference) and schedule.every > total_steps:
        raise ConfigError(
            f"algorithm.reference.every is {schedule.every} optimizer steps, and the campaign has "
            f"{total_steps}: the reference would never move; expected at most "
            f"{total_steps}"
        )
    settings = config.reference
    if needs_frozen_reference(algorithm):
        if settings.stream == "on" and not streams_reference(config, algorithm):
            reason = (
                f"{config.algorithm.type} generates nothing"
                if not generates(algorithm)
                else "the reference moves while later iterations are explored (run.max_staleness "
                f"{config.run.max_staleness})"
            )
            raise ConfigError(f"reference.stream is on, but {reason}; expected auto or off")
        return
    unused = {
        "model": settings.model and settings.model.text,
        "replicas": settings.replicas if settings.replicas > 1 else None,
        "ranks": settings.ranks if settings.ranks > 1 else None,
        "stream": "on" if settings.stream == "on" else None,
    }
    for name, value in unused.items():
        if value is None:
            continue
        reason = (
            "has no reference; leave it out"
            if schedule is None
            else "takes the policy before each iteration as its reference; leave it out, or set "
            "algorithm.reference={type: initial}"
        )
        raise ConfigError(f"reference.{name} is {value}, but {config.algorithm.type} {reason}")


def check_teacher(config: CampaignConfig, algorithm: Algorithm, models: Mapping[str, Path]) -> None:
    """Refuse likeliest tokens of the reference that the policy may not have. Raises ConfigError."""
    top_k = reference_top_k(algorithm)
    if not top_k:
        return
    sizes = {
        key: vocabulary_size(read_model_config(models[key], key=key))
        for key in ("policy.model", "reference.model")
        if key in models
    }
    own = sizes["policy.model"]
    teacher = sizes.get("reference.model", own)
    if own is None or teacher is None:
        return  # a config.json that does not say
    if teacher > own:
        raise ConfigError(
            f"algorithm.top_k is {top_k}, and reference.model has logits for {teacher} tokens, "
            f"policy.model for {own}: the teacher's likeliest may be ones that the policy does not "
            f"have; expected top_k=0, or a teacher with at most {own}"
        )
    if top_k >= teacher:
        raise ConfigError(
            f"algorithm.top_k is {top_k}, and reference.model has {teacher} tokens; expected less"
        )


def _check_ranks(config: CampaignConfig) -> None:
    """Raise ConfigError where a sharded reference cannot be placed, or not computed."""
    settings = config.reference
    share = config.cluster.gpus_per_reference
    if settings.ranks == 1:
        return
    if settings.replicas > 1:
        raise ConfigError(
            f"reference.replicas is {settings.replicas} and reference.ranks {settings.ranks}; "
            "expected replicas=1: ranks share the rows, too"
        )
    if share is not None and share < 1:
        raise ConfigError(
            f"cluster.gpus_per_reference is {share:g}, and each of the {settings.ranks} "
            "reference.ranks needs a GPU of its own (NCCL); expected 1"
        )
    if config.cluster.device == "cpu" and config.policy.dtype == "float16":
        raise ConfigError(
            f"policy.dtype is float16 and reference.ranks {settings.ranks}: DeepSpeed refuses "
            "float16 on most CPUs; expected float32 or bfloat16"
        )


def _check_population(config: CampaignConfig, algorithm: Algorithm) -> None:
    """Raise ConfigError where the log-probs of past policies cannot be computed."""
    if not population_of(algorithm).size:
        return
    if not needs_frozen_reference(algorithm):
        raise ConfigError(
            f"algorithm.population: the reference computes the log-probs of past policies, and "
            f"{config.algorithm.type} has none of its own with these settings; expected "
            "algorithm.reference={type: initial}"
        )
    if config.reference.ranks > 1:
        raise ConfigError(
            f"reference.ranks is {config.reference.ranks}, but {config.algorithm.type} reads past "
            "policies, which a sharded reference cannot load; expected ranks=1"
        )


def _check_values(config: CampaignConfig, algorithm: Algorithm) -> None:
    """Raise ConfigError for learner.stream_values=on where values cannot be streamed."""
    if config.learner.stream_values != "on" or streams_values(config, algorithm):
        return
    if not isinstance(algorithm, TrainsCritic):
        reason = f"{config.algorithm.type} has no critic"
    elif config.run.max_staleness:
        reason = (
            "the critic is trained while later iterations are explored (run.max_staleness "
            f"{config.run.max_staleness})"
        )
    else:
        reason = "the critic sleeps while completions are generated (cluster.placement colocate)"
    raise ConfigError(f"learner.stream_values is on, but {reason}; expected auto or off")

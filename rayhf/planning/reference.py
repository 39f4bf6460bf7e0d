"""Refuse settings of the reference that have no effect."""

from __future__ import annotations

from rayhf.algorithms.base import (
    Algorithm,
    generates,
    needs_frozen_reference,
    streams_reference,
)
from rayhf.config.algorithms import EmaReference
from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError


def check_reference(config: CampaignConfig, algorithm: Algorithm, total_steps: int) -> None:
    """Refuse a reference that would never move, and one that is not used. Raises ConfigError."""
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

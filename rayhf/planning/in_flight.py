"""Refuse in-flight updates where they mean nothing."""

from __future__ import annotations

from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError


def check_in_flight(config: CampaignConfig) -> None:
    """Raise ConfigError unless completions can be unfinished when new weights arrive."""
    if not config.rollout.in_flight_updates:
        if config.rollout.in_flight_kv == "keep":
            raise ConfigError(
                "rollout.in_flight_kv is keep, but rollout.in_flight_updates is false: nothing is "
                "unfinished at an update; expected in_flight_updates: true, or no in_flight_kv"
            )
        return
    if config.run.max_staleness == 0:
        raise ConfigError(
            "rollout.in_flight_updates is true, but run.max_staleness is 0: no completion is "
            "unfinished when training ends; expected run.max_staleness of 1 or more"
        )
    if config.run.is_deterministic:
        raise ConfigError(
            "rollout.in_flight_updates is true, but run.deterministic is true: which tokens get "
            "new weights depends on time; expected run.deterministic: false"
        )


def updates_table(config: CampaignConfig) -> list[tuple[str, str]]:
    """Return a row for the plan where engines take new weights in flight."""
    if not config.rollout.in_flight_updates:
        return []
    kv = "computed again" if config.rollout.in_flight_kv == "recompute" else "kept"
    return [("new weights", f"between two engine steps; KV of unfinished completions {kv}")]

"""Pace of a campaign, from stated speeds of its hardware."""

from __future__ import annotations

from rayhf.config.schema import CampaignConfig


def seconds_per_iteration(
    config: CampaignConfig,
    *,
    samples: int,
    engine_rate: float | None,
    learner_rate: float | None,
) -> dict[str, float]:
    """Return upper bounds of seconds, for each phase whose rate is known.

    As if every completion had its maximum length and were trained on. Scoring, reference and sync
    come on top.

    Args:
        config: the campaign's.
        samples: completions of one iteration.
        engine_rate: tokens per second that one engine generates.
        learner_rate: tokens per second that one learner rank trains on.
    """
    tokens = samples * config.rollout.max_tokens
    seconds = {}
    if engine_rate:
        seconds["rollout"] = tokens / (config.rollout.engines * engine_rate)
    if learner_rate:
        trained = tokens * config.learner.epochs
        seconds["learner"] = trained / (config.learner.ranks * learner_rate)
    return seconds

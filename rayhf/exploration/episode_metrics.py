"""Metrics of an iteration's episodes: how long they are, how they end, what they earn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayhf.episodes import Episode
from rayhf.types import Group

_ENDS = ("done", "turns", "tokens", "reply_tokens", "failed")


def episode_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return the metrics of the groups' episodes; empty where there are none."""
    episodes = [
        sample.completion.episode
        for group in groups
        for sample in group.samples
        if sample.completion.episode is not None
    ]
    if not episodes:
        return {}
    metrics = {
        "environment/turns": float(np.mean([_turns(episode) for episode in episodes])),
        "environment/reply_tokens": float(np.mean([_replied(episode) for episode in episodes])),
        "environment/reward_mean": float(np.mean([episode.reward for episode in episodes])),
    }
    for end in _ENDS:
        share = np.mean([episode.ended == end for episode in episodes])
        metrics[f"environment/ended/{end}"] = float(share)
    for name in sorted({name for episode in episodes for name in episode.metrics}):
        values = [episode.metrics.get(name, 0.0) for episode in episodes]
        metrics[f"environment/own/{name}"] = float(np.mean(values))
    return metrics


def _turns(episode: Episode) -> int:
    return sum(turn.role == "assistant" for turn in episode.turns)


def _replied(episode: Episode) -> int:
    return 0 if episode.inserted is None else len(episode.inserted.token_ids)

"""Metrics of an iteration's episodes: how long they are, how they end, what they earn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from rayhf.episodes import Episode
from rayhf.types import Group

_ENDS = ("done", "turns", "tokens", "reply_tokens", "failed")


def episode_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return the metrics of the groups' episodes; empty where there are none."""
    episodes = [
        parts
        for group in groups
        for index in range(len(group.samples))
        if (parts := _parts(group, index)) and parts[-1].ended is not None
    ]
    if not episodes:
        return {}
    metrics = {
        "environment/turns": _mean(map(_turns, episodes)),
        "environment/reply_tokens": _mean(map(_replied, episodes)),
        "environment/reward_mean": _mean(sum(p.reward for p in parts) for parts in episodes),
    }
    for end in _ENDS:
        metrics[f"environment/ended/{end}"] = _mean(parts[-1].ended == end for parts in episodes)
    for name in sorted({name for parts in episodes for part in parts for name in part.metrics}):
        metrics[f"environment/own/{name}"] = _mean(
            sum(part.metrics.get(name, 0.0) for part in parts) for parts in episodes
        )
    return metrics


def _parts(group: Group, index: int) -> list[Episode]:
    """Return a sample's episode, after those of its parents in a tree, whose parts it continues."""
    parts: list[Episode] = []
    at: int | None = index
    while at is not None:
        sample = group.samples[at]
        if sample.completion.episode is None:
            break
        parts.insert(0, sample.completion.episode)
        at = sample.parent
    return parts


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _turns(parts: Sequence[Episode]) -> int:
    return sum(turn.role == "assistant" for part in parts for turn in part.turns)


def _replied(parts: Sequence[Episode]) -> int:
    """Return the number of tokens of messages that the policy read."""
    return sum(turn.tokens for part in parts for turn in part.turns if turn.role != "assistant")

"""What a round's exploration amounts to: its metrics, and the budget of completions that could not
be scored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayhf.errors import ScorerError
from rayhf.types import Failed, Group, Invalid, Scored


class FailureBudget:
    """Stops a round as soon as more completions than allowed could not be scored."""

    def __init__(self, *, limit: float, expected: int) -> None:
        self.limit, self.allowed = limit, limit * expected
        self.bad, self.heard, self.expected = 0, 0, expected

    def hear(self, group: Group) -> None:
        judged = [s.outcome for s in group.samples if s.outcome is not None]
        bad = [outcome for outcome in judged if not isinstance(outcome, Scored)]
        self.bad += len(bad)
        self.heard += len(judged)
        if bad and self.bad > self.allowed:
            first = bad[0]
            raise ScorerError(
                f"{self.bad} of {self.heard} completions could not be scored (scorer.max_failed allows {self.limit:.0%} of "
                f"{self.expected} in a round); the last: {type(first).__name__}: {first.reason}"
            )


def exploration_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Lengths and truncation are of the answers."""
    samples = [s for g in groups for s in g.samples]
    completions = [s.completion for s in samples if s.kind == "answer"] or [
        s.completion for s in samples
    ]
    if not completions:
        return {}
    lengths = [len(c.token_ids) for c in completions]
    values = [s.outcome.value for s in samples if isinstance(s.outcome, Scored)]
    metrics = {
        "rollout/length_mean": float(np.mean(lengths)),
        "rollout/truncated": float(np.mean([c.finish_reason == "length" for c in completions])),
        "scorer/invalid": float(sum(isinstance(s.outcome, Invalid) for s in samples)),
        "scorer/failed": float(sum(isinstance(s.outcome, Failed) for s in samples)),
        "staleness/max": float(version - min(c.policy_version for c in completions)),
    }
    if values:
        metrics |= {
            "scorer/reward_mean": float(np.mean(values)),
            "scorer/reward_std": float(np.std(values)),
        }
    parts: dict[str, list[float]] = {}
    for sample in samples:
        if isinstance(sample.outcome, Scored):
            for name, value in sample.outcome.parts.items():
                parts.setdefault(name, []).append(value)
    if len(parts) > 1:
        metrics |= {
            f"scorer/{name}/reward_mean": float(np.mean(values)) for name, values in parts.items()
        }
    names = sorted({name for group in groups for name in group.metrics})
    for name in names:
        metrics[name] = float(
            np.mean([group.metrics[name] for group in groups if name in group.metrics])
        )
    return metrics

"""Metrics of an iteration's exploration, and the budget of completions that could not be scored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayhf.data.thinking import thinking_metrics
from rayhf.errors import ScorerError
from rayhf.exploration.episode_metrics import episode_metrics
from rayhf.roles import CountsCalls, Roles
from rayhf.types import Example, Failed, Group, Invalid, Sample, Scored, Skipped, quoted

_NAMED = 3
"""Prompts that a summary names."""


async def scorer_counts(roles: Roles) -> dict[str, float]:
    """Return what the scorers counted since the last call (requests, tokens), as metrics.

    Training and evaluation scorers of the same name are added up: what counts is what was used.
    """
    scorers = [roles.scorer, roles.evaluator, *roles.eval_scorers.values()]
    metrics: dict[str, float] = {}
    for scorer in scorers:
        if isinstance(scorer, CountsCalls):
            for name, count in (await scorer.take_counts()).items():
                metrics[f"scorer/{name}"] = metrics.get(f"scorer/{name}", 0.0) + count
    return metrics


class FailureBudget:
    """Stops an iteration as soon as too many completions could not be scored.

    Those that every scorer skipped do not count.
    """

    def __init__(self, *, limit: float, expected: int) -> None:
        """Allow the share `limit` of `expected` completions to be without a score."""
        self.limit = limit
        self.expected = expected
        self.unscored = 0
        self.outcomes = 0
        self.problems: dict[str, int] = {}
        """Completions without a score, by prompt and first reason."""

    def count(self, group: Group) -> None:
        """Count a finished group. Raises ScorerError where the budget is exceeded."""
        outcomes = [s.outcome for s in group.samples if s.outcome is not None]
        unscored = [o for o in outcomes if not isinstance(o, Scored | Skipped)]
        self.unscored += len(unscored)
        self.outcomes += len(outcomes)
        if not unscored:
            return
        last = unscored[0]
        problem = f"{quoted(group.prompt)}: {type(last).__name__}: {last.reason}"
        self.problems[problem] = self.problems.get(problem, 0) + len(unscored)
        if self.unscored > self.limit * self.expected:
            raise ScorerError(
                f"{self.unscored} of {self.outcomes} completions could not be scored "
                f"(scorer.max_failed allows {self.limit:.0%} of {self.expected} per iteration); "
                f"the last: {problem}"
            )

    def summary(self) -> str:
        """Return which completions could not be scored; "" where all could."""
        if not self.problems:
            return ""
        named = sorted(self.problems.items(), key=lambda item: -item[1])[:_NAMED]
        listed = "; ".join(f"{count} of {problem}" for problem, count in named)
        more = len(self.problems) - len(named)
        return f"{self.unscored} of {self.outcomes} completions could not be scored: {listed}" + (
            f"; and of {more} other prompts" if more else ""
        )


def exploration_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Return the metrics of the groups; `version` is the current weight version.

    Lengths and truncation are those of samples of kind "answer", where there are any.
    """
    samples = [s for g in groups for s in g.samples]
    completions = [s.completion for s in answers_of(samples)]
    if not completions:
        return {}
    scored = [s.outcome for s in samples if isinstance(s.outcome, Scored)]
    oldest = min(c.policy_version for c in completions)
    metrics = {
        "rollout/length_mean": float(np.mean([len(c.token_ids) for c in completions])),
        "rollout/truncated": float(np.mean([c.finish_reason == "length" for c in completions])),
        "scorer/invalid": float(sum(type(s.outcome) is Invalid for s in samples)),
        "scorer/skipped": float(sum(isinstance(s.outcome, Skipped) for s in samples)),
        "scorer/failed": float(sum(isinstance(s.outcome, Failed) for s in samples)),
        "staleness/max": float(version - oldest),
    }
    metrics |= {f"rollout/{name}": value for name, value in thinking_metrics(completions).items()}
    if scored:
        values = [outcome.value for outcome in scored]
        metrics["scorer/reward_mean"] = float(np.mean(values))
        metrics["scorer/reward_std"] = float(np.std(values))
    metrics |= episode_metrics(groups)
    parts: dict[str, list[float]] = {}
    for outcome in scored:
        for name, value in outcome.parts.items():
            parts.setdefault(name, []).append(value)
    if len(parts) > 1:
        for name, values in parts.items():
            metrics[f"scorer/{name}/reward_mean"] = float(np.mean(values))
    for name in sorted({name for group in groups for name in group.metrics}):
        values = [group.metrics[name] for group in groups if name in group.metrics]
        metrics[name] = float(np.mean(values))
    return metrics


def source_metrics(groups: Sequence[Group], examples: Sequence[Example]) -> dict[str, float]:
    """Return reward, length, share and kept prompts of each source, where there are several."""
    by_source: dict[str, list[Group]] = {}
    for group in groups:
        by_source.setdefault(group.prompt.source, []).append(group)
    if len(by_source) < 2:
        return {}
    trained = {e.rows[0].prompt_id for e in examples if not e.iterations_back}
    metrics: dict[str, float] = {}
    for name, own in by_source.items():
        samples = answers_of([sample for group in own for sample in group.samples])
        scores = [s.outcome.value for s in samples if isinstance(s.outcome, Scored)]
        kept = sum(group.prompt.prompt_id in trained for group in own)
        values = {"share": len(own) / len(groups), "kept": kept / len(own)}
        if samples:
            values["length"] = float(np.mean([len(s.completion.token_ids) for s in samples]))
        if scores:
            values["reward"] = float(np.mean(scores))
        metrics |= {f"source/{name}/{metric}": value for metric, value in values.items()}
    return metrics


def answers_of(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples of kind "answer", or all where there are none."""
    return [s for s in samples if s.kind == "answer"] or list(samples)

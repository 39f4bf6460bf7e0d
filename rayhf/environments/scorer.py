"""The scorer of a campaign with environments: rewards of episodes, beside the scorers' verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rayhf.config.environments import EnvironmentConfig
from rayhf.roles import CountsCalls, FollowsPolicy, Scorer
from rayhf.scorer.comparisons import compare_scores
from rayhf.scorer.none import NoScorer
from rayhf.types import (
    Compared,
    Comparison,
    Completion,
    Outcome,
    Scored,
    ScoreRequest,
)

PART = "environment"
"""Name of an environment's reward among the parts of a score."""


class EpisodeScorer:
    """Scorer role that adds the reward of an episode to its score.

    An episode that failed has the reason as its outcome, and scorers do not see it. Where pairwise
    scorers compare, they alone decide between episodes that did not fail.
    """

    def __init__(
        self,
        scorer: Scorer,
        environments: Sequence[EnvironmentConfig],
        *,
        is_pairwise: bool,
    ) -> None:
        self._scorer = scorer
        self._rewards = {config.resolved_name: config.rewards for config in environments}
        self._is_pairwise = is_pairwise

    async def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return one outcome per completion of each request."""
        judged = [self._judged(request) for request in requests]
        sent = [request for request in judged if request.completions]
        answers = iter(await self._scorer.score(sent) if sent else [])
        results = []
        for request, own in zip(requests, judged, strict=True):
            outcomes = iter(next(answers)) if own.completions else iter(())
            scored = {id(completion) for completion in own.completions}
            results.append(
                tuple(
                    self._outcome(each, next(outcomes) if id(each) in scored else None)
                    for each in request.completions
                )
            )
        return results

    async def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return the win probabilities among each request's completions."""
        if not self._is_pairwise:
            return [compare_scores(outcomes) for outcomes in await self.score(requests)]
        comparisons = await self._scorer.compare(requests)
        return [
            _without_failed(comparison, request.completions)
            for comparison, request in zip(comparisons, requests, strict=True)
        ]

    def _judged(self, request: ScoreRequest) -> ScoreRequest:
        """Return the request with the completions that the campaign's scorers judge."""
        alone = isinstance(self._scorer, NoScorer)
        kept = tuple(
            each
            for each in request.completions
            if each.episode is None or not (alone or each.episode.problem is not None)
        )
        return replace(request, completions=kept)

    def _outcome(self, completion: Completion, outcome: Outcome | None) -> Outcome:
        """Return a completion's outcome from that of the scorers, None where they did not judge."""
        episode = completion.episode
        if episode is None:
            assert outcome is not None
            return outcome
        if episode.problem is not None:
            return episode.problem
        if outcome is None:
            return Scored(value=episode.reward)
        if not (isinstance(outcome, Scored) and self._rewards[episode.environment]):
            return outcome
        return replace(
            outcome,
            value=outcome.value + episode.reward,
            parts={**outcome.parts, PART: episode.reward},
        )

    async def state_dict(self) -> dict[str, Any]:
        """Return the scorers' state."""
        return await self._scorer.state_dict()

    async def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        await self._scorer.load_state_dict(state)

    async def observe(self, metrics: Mapping[str, float]) -> None:
        """Pass an iteration's metrics on, where the scorer follows the policy."""
        if isinstance(self._scorer, FollowsPolicy):
            await self._scorer.observe(metrics)

    async def take_counts(self) -> dict[str, float]:
        """Return what the scorers counted since the last call."""
        return await self._scorer.take_counts() if isinstance(self._scorer, CountsCalls) else {}


def _without_failed(comparison: Comparison, completions: Sequence[Completion]) -> Comparison:
    """Return the comparison with nothing known of episodes that failed."""
    failed = [
        index
        for index, completion in enumerate(completions)
        if completion.episode is not None and completion.episode.problem is not None
    ]
    if not (failed and isinstance(comparison, Compared)):
        return comparison
    win = comparison.win.copy()
    for index in failed:
        win[index, :] = float("nan")
        win[:, index] = float("nan")
        win[index, index] = 0.5
    return replace(comparison, win=win)

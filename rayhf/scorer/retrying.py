"""Retries of a scorer that is unreachable; one that stays unreachable pauses the campaign.

In: a scorer role. Out: the same interface. Only transient failures are retried, and only the
completions that failed; an error in a completion or a rule is final. A few of a call's completions
may stay failed after `attempts` (they are dropped and counted). When more than `tolerated` of them
were retried and none came back, the scorer is down: it is retried until it responds, and the
campaign resumes automatically. No score is ever made up.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rayhf.roles import CountsCalls, FollowsPolicy, Scorer
from rayhf.scorer.replies import moved
from rayhf.types import Comparison, Failed, Outcome, Scored, ScoreRequest

Report = Callable[[str, str], None]
"""Receives (event, message); the events are pause and unpause."""


class RetryingScorer:
    """Scorer over another one, with retries.

    Args:
        inner: the scorer.
        attempts: maximum number of calls for a completion while the scorer is up.
        tolerated: share of a call that may stay failed.
        report: called when the scorer is taken to be down, and when it is back.
        first_wait_s: wait before the second call in seconds; doubled each time, up to max_wait_s,
            and jittered by half.
        max_wait_s: limit on the wait, in seconds.
    """

    def __init__(
        self,
        inner: Scorer,
        *,
        attempts: int,
        tolerated: float,
        report: Report,
        first_wait_s: float = 0.5,
        max_wait_s: float = 30.0,
    ) -> None:
        self._inner = inner
        self._attempts = attempts
        self._tolerated = tolerated
        self._report = report
        self._first_wait_s = first_wait_s
        self._max_wait_s = max_wait_s
        self._down = False

    async def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return the outcomes; those that are transient failures have been retried."""
        results = [list(outcomes) for outcomes in await self._inner.score(requests)]
        places = [(i, j) for i, row in enumerate(results) for j in range(len(row))]
        total = len(places)
        attempt = 1
        while failed := [(i, j) for i, j in places if _is_transient(results[i][j])]:
            i, j = failed[0]
            if not await self._wait(attempt, results[i][j], len(failed), len(places), total):
                break
            places = failed
            attempt += 1
            rows: dict[int, list[int]] = {}
            for i, j in places:
                rows.setdefault(i, []).append(j)
            part = [_select(requests[i], positions) for i, positions in rows.items()]
            retried = await self._inner.score(part)
            outcomes = (outcome for row in retried for outcome in row)
            for (i, j), outcome in zip(places, outcomes, strict=True):
                results[i][j] = _in_whole(outcome, rows[i])
        self._report_up()
        return [tuple(row) for row in results]

    async def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return the comparisons; those that are transient failures have been retried."""
        results = list(await self._inner.compare(requests))
        places = list(range(len(results)))
        attempt = 1
        while failed := [i for i in places if _is_transient(results[i])]:
            example = results[failed[0]]
            if not await self._wait(attempt, example, len(failed), len(places), len(results)):
                break
            places = failed
            attempt += 1
            retried = await self._inner.compare([requests[i] for i in places])
            for i, comparison in zip(places, retried, strict=True):
                results[i] = comparison
        self._report_up()
        return results

    async def state_dict(self) -> dict[str, Any]:
        """Return the scorer's state."""
        return await self._inner.state_dict()

    async def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the scorer's state."""
        await self._inner.load_state_dict(state)

    async def observe(self, metrics: Mapping[str, float]) -> None:
        """Pass an iteration's metrics on, where the scorer follows the policy."""
        if isinstance(self._inner, FollowsPolicy):
            await self._inner.observe(metrics)

    async def take_counts(self) -> dict[str, float]:
        """Return what the scorer counted since the last call."""
        return await self._inner.take_counts() if isinstance(self._inner, CountsCalls) else {}

    async def _wait(
        self, attempt: int, example: Outcome | Comparison, failed: int, called: int, total: int
    ) -> bool:
        """Wait, unless the failures are final. Returns whether to retry.

        Args:
            attempt: number of calls so far.
            example: one of the failures.
            failed: failures in the last call.
            called: completions or requests in the last call.
            total: completions or requests in the first one.
        """
        if attempt >= self._attempts:
            if failed < called or failed <= self._tolerated * total:
                return False
            if not self._down and isinstance(example, Failed):
                self._down = True
                self._report(
                    "pause",
                    "the scorer is down; the campaign pauses and resumes automatically when it "
                    f"responds: {example.reason}",
                )
        wait_s = min(self._max_wait_s, self._first_wait_s * 2.0 ** min(attempt - 1, 30))
        await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
        return True

    def _report_up(self) -> None:
        if self._down:
            self._down = False
            self._report("unpause", "the scorer is back")


def _is_transient(result: Outcome | Comparison) -> bool:
    return isinstance(result, Failed) and result.transient


def _in_whole(outcome: Outcome, positions: Sequence[int]) -> Outcome:
    """Return the outcome of a selection, its replies with the indices of the whole request."""
    if isinstance(outcome, Scored) and outcome.replies:
        return replace(outcome, replies=moved(outcome.replies, positions))
    return outcome


def _select(request: ScoreRequest, positions: Sequence[int]) -> ScoreRequest:
    completions = tuple(request.completions[position] for position in positions)
    return replace(request, completions=completions)

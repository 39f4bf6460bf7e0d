"""A scorer that cannot be reached is asked again; one that stays away pauses the campaign, which
goes on by itself.

In: a scorer role. Out: the same verbs. Only transient failures are repeated, and only what failed;
what is wrong with an answer or a rule stays wrong. A few of a call's completions may stay failed
after `attempts` (they are dropped and counted); when more than `tolerated` of them were asked for
again and nothing came back, the scorer is down, and is asked until it is up again: no score is ever
made up.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rayhf.roles import Scorer
from rayhf.types import Comparison, Failed, Outcome, ScoreRequest

Report = Callable[[str, str], None]
"""(kind, message); kinds: pause, unpause."""


class RetryingScorer:
    """Scorer over another one.

    Args:
        attempts: calls at most for a failure that is not the whole scorer's.
        tolerated: share of a call that may stay failed.
        first_wait_s: before the second call; doubled each time, up to max_wait_s, and jittered by
        half. report: told when the scorer is taken to be down, and when it is back.
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
        self._inner, self._attempts, self._tolerated, self._report = (
            inner,
            attempts,
            tolerated,
            report,
        )
        self._first_wait_s, self._max_wait_s = first_wait_s, max_wait_s
        self._down = False

    async def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        answers = [list(outcomes) for outcomes in await self._inner.score(requests)]
        every = [(i, j) for i, row in enumerate(answers) for j in range(len(row))]
        asked, attempt = every, 1
        while failed := [(i, j) for i, j in asked if _transient(answers[i][j])]:
            if not await self._again(
                attempt, answers[failed[0][0]][failed[0][1]], len(failed), len(asked), len(every)
            ):
                break
            asked, attempt = failed, attempt + 1
            rows: dict[int, list[int]] = {}
            for i, j in asked:
                rows.setdefault(i, []).append(j)
            part = [_only(requests[i], positions) for i, positions in rows.items()]
            fresh = iter(
                [outcome for outcomes in await self._inner.score(part) for outcome in outcomes]
            )
            for i, j in asked:
                answers[i][j] = next(fresh)
        self._up()
        return [tuple(row) for row in answers]

    async def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        answers = list(await self._inner.compare(requests))
        asked, attempt = list(range(len(answers))), 1
        while failed := [i for i in asked if _transient(answers[i])]:
            if not await self._again(
                attempt, answers[failed[0]], len(failed), len(asked), len(answers)
            ):
                break
            asked, attempt = failed, attempt + 1
            fresh = iter(await self._inner.compare([requests[i] for i in asked]))
            for i in asked:
                answers[i] = next(fresh)
        self._up()
        return answers

    async def state_dict(self) -> dict[str, Any]:
        return await self._inner.state_dict()

    async def load_state_dict(self, state: Mapping[str, Any]) -> None:
        await self._inner.load_state_dict(state)

    async def _again(
        self, attempt: int, example: Outcome | Comparison, failed: int, asked: int, of: int
    ) -> bool:
        """Wait, and say whether to ask once more: `failed` of the `asked` ones failed, in a call
        `of` so many."""
        if attempt >= self._attempts:
            if failed < asked or failed <= self._tolerated * of:
                return False
            if not self._down and isinstance(example, Failed):
                self._down = True
                self._report(
                    "pause",
                    f"the scorer is down, nothing goes on until it is back: {example.reason}",
                )
        wait_s = min(self._max_wait_s, self._first_wait_s * 2.0 ** min(attempt - 1, 30))
        await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
        return True

    def _up(self) -> None:
        if self._down:
            self._down = False
            self._report("unpause", "the scorer is back")


def _transient(answer: Outcome | Comparison) -> bool:
    return isinstance(answer, Failed) and answer.transient


def _only(request: ScoreRequest, positions: Sequence[int]) -> ScoreRequest:
    return replace(
        request, completions=tuple(request.completions[position] for position in positions)
    )

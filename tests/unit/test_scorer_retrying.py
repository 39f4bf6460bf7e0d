"""An unreachable scorer: retried, waited for, and never replaced by a made-up score."""

import asyncio
import random

import pytest
from fakes import FakeScorer, make_prompts

from rayhf.scorer.retrying import RetryingScorer
from rayhf.types import Completion, Failed, Invalid, Scored, ScoreRequest, float_array, token_array

UNREACHABLE = Failed(reason="ConnectionError: refused", transient=True)
BROKEN = Failed(reason="ValueError: no")


def request(prompt, n=4):
    completions = [
        Completion(
            prompt_id=prompt.prompt_id,
            index=i,
            seed=i,
            text=str(i),
            token_ids=token_array((i, 2, 3)),
            logprobs=float_array((-1.0,) * 3),
            finish_reason="stop",
            policy_version=0,
        )
        for i in range(n)
    ]
    return ScoreRequest(prompt=prompt, completions=tuple(completions))


REQUESTS = [request(prompt) for prompt in make_prompts(6)]
TRUTH = asyncio.run(FakeScorer().score(REQUESTS))


class Faulty(FakeScorer):
    """Each outcome is unreachable with probability `share`; all of the first `down` calls are."""

    def __init__(self, share=0.0, down=0, other=None):
        super().__init__()
        self.share = share
        self.down = down
        self.other = other
        self.calls = []
        self.rng = random.Random(0)

    async def score(self, requests):
        self.calls.append(sum(len(r.completions) for r in requests))
        rows = await super().score(requests)
        if self.down:
            self.down -= 1
            return [tuple(UNREACHABLE for _ in row) for row in rows]
        return [
            tuple(UNREACHABLE if self.rng.random() < self.share else self.other or o for o in row)
            for row in rows
        ]


def retrying(scorer, attempts=4):
    """Return the scorer with retries, and the list of what it reports."""
    events = []
    scorer = RetryingScorer(
        scorer,
        attempts=attempts,
        tolerated=0.1,
        report=lambda *event: events.append(event),
        first_wait_s=1e-4,
        max_wait_s=1e-3,
    )
    return scorer, events


def test_only_failures_are_retried_and_no_score_is_invented():
    faulty = Faulty(share=0.3)
    scorer, events = retrying(faulty, attempts=20)
    assert asyncio.run(scorer.score(REQUESTS)) == TRUTH
    assert faulty.calls[0] == 24
    assert faulty.calls == sorted(faulty.calls, reverse=True)
    assert events == []


def test_unreachable_outcomes_stay_failed():
    scorer, events = retrying(Faulty(share=0.5), attempts=2)
    rows = asyncio.run(scorer.score(REQUESTS))
    pairs = [
        (outcome, true)
        for row, true_row in zip(rows, TRUTH, strict=True)
        for outcome, true in zip(row, true_row, strict=True)
    ]
    assert any(outcome == UNREACHABLE for outcome, _ in pairs)
    assert all(outcome in (true, UNREACHABLE) for outcome, true in pairs)
    assert events == []


def test_unreachable_scorer_pauses_and_resumes_automatically():
    faulty = Faulty(down=9)
    scorer, events = retrying(faulty)
    assert asyncio.run(scorer.score(REQUESTS)) == TRUTH
    assert [name for name, _ in events] == ["pause", "unpause"]
    assert "refused" in events[0][1]
    assert len(faulty.calls) == 10


@pytest.mark.parametrize("other", [BROKEN, Invalid(reason="NaN"), Scored(value=1.0)])
def test_final_outcomes_are_not_retried(other):
    faulty = Faulty(other=other)
    scorer, _ = retrying(faulty)
    assert all(outcome == other for row in asyncio.run(scorer.score(REQUESTS)) for outcome in row)
    assert len(faulty.calls) == 1


def test_comparisons_are_retried_too():
    class FaultyComparisons(FakeScorer):
        left = 6

        async def compare(self, requests):
            comparisons = await super().compare(requests)
            self.left -= 1
            return [
                UNREACHABLE if self.left > 0 and (self.left > 3 or i % 2) else comparison
                for i, comparison in enumerate(comparisons)
            ]

    scorer, events = retrying(FaultyComparisons(), attempts=9)
    comparisons = asyncio.run(scorer.compare(REQUESTS))
    truth = asyncio.run(FakeScorer().compare(REQUESTS))
    assert all((c.win == t.win).all() for c, t in zip(comparisons, truth, strict=True))
    assert events == []


def test_scorer_that_fails_during_a_call_pauses():
    class Halfway(FakeScorer):
        calls = 0

        async def score(self, requests):
            self.calls += 1
            rows = await super().score(requests)
            if self.calls == 1:
                return rows[:3] + [tuple(UNREACHABLE for _ in row) for row in rows[3:]]
            return [tuple(UNREACHABLE for _ in row) for row in rows] if self.calls < 9 else rows

    scorer, events = retrying(Halfway())
    assert asyncio.run(scorer.score(REQUESTS)) == TRUTH
    assert [name for name, _ in events] == ["pause", "unpause"]


def test_completion_that_always_fails_does_not_pause_forever():
    class Poisoned(FakeScorer):
        async def score(self, requests):
            rows = await super().score(requests)
            poisoned = iter(
                (r.prompt.prompt_id, c.index) == ("p000", 0)
                for r in requests
                for c in r.completions
            )
            return [tuple(UNREACHABLE if next(poisoned) else o for o in row) for row in rows]

    scorer, events = retrying(Poisoned())
    rows = asyncio.run(scorer.score(REQUESTS))
    assert rows[0][0] == UNREACHABLE
    assert rows[0][1:] == TRUTH[0][1:]
    assert rows[1:] == TRUTH[1:]
    assert events == []

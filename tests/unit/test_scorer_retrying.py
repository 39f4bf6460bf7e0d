"""A scorer that cannot be reached: asked again, waited for, never answered for."""

import asyncio
import random

import pytest
from fakes import FakeScorer, make_prompts

from rayhf.scorer.retrying import RetryingScorer
from rayhf.types import Completion, Failed, Invalid, Scored, ScoreRequest

AWAY = Failed(reason="ConnectionError: refused", transient=True)
BROKEN = Failed(reason="ValueError: no")


def request(prompt, n=4):
    completions = tuple(
        Completion(
            prompt_id=prompt.prompt_id, index=i, seed=i, text=str(i), token_ids=(i, 2, 3), logprobs=(-1.0,) * 3,
            finish_reason="stop", policy_version=0,
        )
        for i in range(n)
    )  # fmt: skip
    return ScoreRequest(prompt=prompt, completions=completions)


REQUESTS = [request(prompt) for prompt in make_prompts(6)]
TRUTH = asyncio.run(FakeScorer().score(REQUESTS))


class Faulty(FakeScorer):
    """Each answer is away with probability `share`, as long as the calls last; everything is while
    it is `down`."""

    def __init__(self, share=0.0, down=0, other=None):
        super().__init__()
        self.share, self.down, self.other, self.calls, self.rng = (
            share,
            down,
            other,
            [],
            random.Random(0),
        )

    async def score(self, requests):
        self.calls.append(sum(len(r.completions) for r in requests))
        answers = await super().score(requests)
        if self.down:
            self.down -= 1
            return [tuple(AWAY for _ in row) for row in answers]
        return [
            tuple(AWAY if self.rng.random() < self.share else self.other or o for o in row)
            for row in answers
        ]


def patient(scorer, attempts=4):
    heard = []
    return RetryingScorer(
        scorer,
        attempts=attempts,
        tolerated=0.1,
        report=lambda *said: heard.append(said),
        first_wait_s=1e-4,
        max_wait_s=1e-3,
    ), heard


def test_only_what_failed_is_asked_again_and_no_score_is_made_up():
    scorer = Faulty(share=0.3)
    asked, heard = patient(scorer, attempts=20)
    assert asyncio.run(asked.score(REQUESTS)) == TRUTH
    assert (
        scorer.calls[0] == 24 and scorer.calls == sorted(scorer.calls, reverse=True) and heard == []
    )


def test_what_stays_away_stays_failed():
    asked, heard = patient(Faulty(share=0.5), attempts=2)
    answers = asyncio.run(asked.score(REQUESTS))
    flat = [
        (a, t)
        for row, true in zip(answers, TRUTH, strict=True)
        for a, t in zip(row, true, strict=True)
    ]
    assert any(a == AWAY for a, _ in flat) and all(a in (t, AWAY) for a, t in flat) and heard == []


def test_a_scorer_that_is_down_pauses_and_goes_on_by_itself():
    scorer = Faulty(down=9)
    asked, heard = patient(scorer)
    assert asyncio.run(asked.score(REQUESTS)) == TRUTH
    assert (
        [kind for kind, _ in heard] == ["pause", "unpause"]
        and "refused" in heard[0][1]
        and len(scorer.calls) == 10
    )


@pytest.mark.parametrize("other", [BROKEN, Invalid(reason="NaN"), Scored(value=1.0)])
def test_what_is_wrong_for_good_is_not_asked_again(other):
    scorer = Faulty(other=other)
    asked, _ = patient(scorer)
    assert all(outcome == other for row in asyncio.run(asked.score(REQUESTS)) for outcome in row)
    assert len(scorer.calls) == 1


def test_comparisons_are_patient_too():
    class Away(FakeScorer):
        left = 6

        async def compare(self, requests):
            answers = await super().compare(requests)
            self.left -= 1
            return [
                AWAY if self.left > 0 and (self.left > 3 or i % 2) else a
                for i, a in enumerate(answers)
            ]

    asked, heard = patient(Away(), attempts=9)
    answers = asyncio.run(asked.compare(REQUESTS))
    truth = asyncio.run(FakeScorer().compare(REQUESTS))
    assert all((a.win == t.win).all() for a, t in zip(answers, truth, strict=True)) and heard == []


def test_a_scorer_that_goes_down_in_the_middle_of_a_call_pauses_too():
    class Halfway(FakeScorer):
        calls = 0

        async def score(self, requests):
            self.calls += 1
            answers = await super().score(requests)
            if self.calls == 1:
                return answers[:3] + [tuple(AWAY for _ in row) for row in answers[3:]]
            return [tuple(AWAY for _ in row) for row in answers] if self.calls < 9 else answers

    asked, heard = patient(Halfway())
    assert asyncio.run(asked.score(REQUESTS)) == TRUTH and [kind for kind, _ in heard] == [
        "pause",
        "unpause",
    ]


def test_a_completion_that_always_fails_does_not_pause_for_ever():
    class Poisoned(FakeScorer):
        async def score(self, requests):
            answers = await super().score(requests)
            poison = [
                (r.prompt.prompt_id, c.index) == ("p000", 0)
                for r in requests
                for c in r.completions
            ]
            bad = iter(poison)
            return [tuple(AWAY if next(bad) else outcome for outcome in row) for row in answers]

    asked, heard = patient(Poisoned())
    answers = asyncio.run(asked.score(REQUESTS))
    assert (
        answers[0][0] == AWAY
        and answers[0][1:] == TRUTH[0][1:]
        and answers[1:] == TRUTH[1:]
        and heard == []
    )

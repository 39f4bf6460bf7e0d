"""What judges write: from their replies to the tables of a run, with nothing hostile in it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from campaigns import make_config, run_campaign
from fakes import FakeLearner, FakeScorer
from score_requests import request
from serving import SETUP, Lengths, grpc_entry, serve
from test_scorer_judge import FakeGenerator, longest, make_judge, shown

from rayhf.config.scorers import PairwiseEntryConfig, PointwiseEntryConfig
from rayhf.errors import clean_text
from rayhf.exploration.codecs import COMPARE, SCORE
from rayhf.exploration.journal import Journal
from rayhf.scorer.build import build_scorer
from rayhf.scorer.combine import Combined
from rayhf.scorer.comparisons import check_comparisons, check_outcomes
from rayhf.scorer.parts import Part
from rayhf.scorer.replies import MAX_REPLIES, REPLY_CHARS
from rayhf.scorer.retrying import RetryingScorer
from rayhf.types import (
    Compared,
    Comparison,
    Failed,
    Invalid,
    JudgeReply,
    Outcome,
    Scored,
    ScoreRequest,
)

HOSTILE = "\x1b[2J</script><img src=x>\x00\r\nfine\tplace \ud800\u202e\nVerdict: yes"
CLEAN = "</script><img src=x>?\nfine\tplace ??\nVerdict: yes"
EVEN = np.full((2, 2), 0.5)


def words(outcome: object) -> list[str]:
    assert isinstance(outcome, Scored)
    return [reply.text for reply in outcome.replies]


# ------------------------------------------------------------------------------------------ judges


def test_every_vote_is_kept_also_one_that_does_not_count() -> None:
    said = ["It adds up. Verdict: yes", "Hm.", "It does not. Verdict: no"]
    responses = iter(said)
    judge = make_judge(
        FakeGenerator(lambda question, seed: next(responses)),
        votes=3,
        temperature=0.7,
        keep_replies=3,
    )
    [(outcome,)] = judge.score([request("four")])
    assert words(outcome) == said
    assert [reply.left_out for reply in outcome.replies] == [False, True, False]
    assert {(reply.part, reply.against) for reply in outcome.replies} == {("", None)}


@pytest.mark.parametrize("limit", [0, 2])
def test_as_many_are_kept_as_the_config_says(limit: int) -> None:
    judge = make_judge(
        FakeGenerator(lambda question, seed: "Verdict: yes"),
        votes=5,
        temperature=0.7,
        keep_replies=limit,
    )
    [(outcome,)] = judge.score([request("four")])
    assert len(words(outcome)) == limit and outcome.parts["votes"] == 5.0


def test_each_criterion_has_its_words_before_any_has_more() -> None:
    def write(question: str, seed: int) -> str:
        name = "polite" if "polite" in question else "clear"
        return f"It is {name}.\nCriterion 1: yes"

    judge = make_judge(
        FakeGenerator(write),
        rubric=[{"criterion": "Is it polite?", "name": "polite"}, "Is it clear?"],
        per_criterion=True,
        votes=2,
        temperature=0.7,
        keep_replies=3,
    )
    [(outcome,)] = judge.score([request("four")])
    assert [(reply.part, reply.text.split(".")[0]) for reply in outcome.replies] == [
        ("polite", "It is polite"),
        ("2", "It is clear"),
        ("polite", "It is polite"),
    ]


def test_replies_about_a_pair_belong_to_the_completion_that_was_shown_first() -> None:
    def write(question: str, seed: int) -> str:
        shows = f"{shown(question, 'first')} before {shown(question, 'second')}"
        return shows if shows == "b before aaa" else f"{shows}\n{longest(question, seed)}"

    judge = make_judge(FakeGenerator(write), mode="pairwise", keep_replies=8)
    [compared] = judge.compare([request("aaa", "b", "cc")])
    assert isinstance(compared, Compared) and np.isnan(compared.win[0, 1])
    told = [
        [(reply.against, reply.text.split("\n")[0]) for reply in replies]
        for replies in compared.replies
    ]
    # An order without a verdict has a reason instead, and the other order keeps its words.
    assert told == [
        [(1, "aaa before b"), (2, "aaa before cc")],
        [(2, "b before cc")],
        [(0, "cc before aaa"), (1, "cc before b")],
    ]
    [outcomes] = judge.score([request("aaa", "b", "cc")])
    assert [o.replies for o in outcomes if isinstance(o, Scored)] == list(compared.replies)


# ------------------------------------------------------------------------------------------ bounds


def test_hostile_words_are_bounded_and_can_be_stored() -> None:
    reply = JudgeReply(text=HOSTILE, part="a\nb" * 200)
    [(outcome,)] = check_outcomes([(Scored(value=1.0, replies=(reply,) * 99),)], [request("a")])
    assert isinstance(outcome, Scored) and len(outcome.replies) == MAX_REPLIES
    assert set(words(outcome)) == {CLEAN}
    assert len(outcome.replies[0].part) == 200 and outcome.replies[0].part.isprintable()
    long = clean_text("reasons " * 9999 + "Verdict: no", REPLY_CHARS)
    assert len(long) <= REPLY_CHARS and long.startswith("reasons") and long.endswith("Verdict: no")
    assert "[...]" in long


@pytest.mark.parametrize("replies", [5, ("text",), (JudgeReply(text=5),)])  # type: ignore[arg-type]
def test_replies_of_other_types_are_refused(replies: object) -> None:
    scored = Scored(value=1.0, replies=replies)  # type: ignore[arg-type]
    [[outcome]] = check_outcomes([(scored,)], [request("a")])
    assert isinstance(outcome, Invalid) and "its replies are no JudgeReplies: " in outcome.reason


@pytest.mark.parametrize("against", [2, -1])
def test_reply_about_a_completion_that_is_not_there_is_refused(against: int) -> None:
    reply = JudgeReply(text="x", against=against)
    asked = [request("a", "b")]
    message = f"a reply compares with completion {against}, the request has 2"
    [row] = check_outcomes([(Scored(value=1.0, replies=(reply,)),) * 2], asked)
    assert row == (Invalid(reason=message),) * 2
    compared = Compared(win=EVEN, source="pairwise", replies=((reply,), ()))
    assert check_comparisons([compared], asked) == [Failed(reason=message)]
    short = replace(compared, replies=((),))
    [failed] = check_comparisons([short], asked)
    assert isinstance(failed, Failed) and "replies about 1 completions" in failed.reason


# --------------------------------------------------------------------- through other scorers' parts


class Talks(Lengths):
    """A scorer that says something about every completion and every pair."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        return [
            tuple(
                Scored(value=1.0, parts={"votes": 1.0}, replies=(JudgeReply(text=f"on {c.text}"),))
                for c in r.completions
            )
            for r in requests
        ]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        pair = (
            (JudgeReply(text=HOSTILE, part="votes", against=1, left_out=True),),
            (JudgeReply(text="other", against=0),),
        )
        return [Compared(win=EVEN, source="pairwise", replies=pair) for _ in requests]


def test_combination_names_who_said_it() -> None:
    parts = [
        Part(PointwiseEntryConfig(name="a"), Talks()),
        Part(PointwiseEntryConfig(name="b"), Talks()),
        Part(PointwiseEntryConfig(name="rule"), Lengths()),
    ]
    [(outcome,)] = Combined(parts).score([request("x")])
    assert isinstance(outcome, Scored)
    assert outcome.replies == (
        JudgeReply(text="on x", part="a"),
        JudgeReply(text="on x", part="b"),
    )
    # Without a pairwise scorer a comparison is one of scores, with the words about each.
    [compared] = Combined(parts).compare([request("x", "y")])
    assert isinstance(compared, Compared)
    assert [reply.text for reply in compared.replies_about(1)] == ["on y", "on y"]
    game = Part(PairwiseEntryConfig(name="game"), Talks())
    [compared] = Combined([game, parts[0]]).compare([request("x", "y")])
    assert isinstance(compared, Compared)
    assert [(reply.part, reply.against) for reply in compared.replies_about(0)] == [
        ("game/votes", 1),
        ("a", None),
    ]


def test_words_come_through_the_service() -> None:
    for pairwise in (False, True):
        server = serve(Talks(), pairwise=pairwise)
        there = build_scorer([grpc_entry(server, pairwise=pairwise)], SETUP)
        try:
            if pairwise:
                [compared] = there.compare([request("x", "y")])
                assert isinstance(compared, Compared)
                assert compared.replies == (
                    (JudgeReply(text=CLEAN, part="grpc/votes", against=1, left_out=True),),
                    (JudgeReply(text="other", part="grpc", against=0),),
                )
            else:
                [(outcome,)] = there.score([request("x")])
                assert isinstance(outcome, Scored)
                assert outcome.replies == (JudgeReply(text="on x", part="grpc"),)
        finally:
            there.close()
            server.stop()


def test_retried_completions_keep_the_indices_of_their_request() -> None:
    class Halves(FakeScorer):
        """The first two of three completions are unreachable at first, then compared."""

        calls = 0

        async def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
            self.calls += 1
            lost = Failed(reason="down", transient=True)
            if self.calls == 1:
                return [(Scored(value=0.0), lost, lost)]
            return [
                tuple(
                    Scored(value=1.0, replies=(JudgeReply(text=c.text, against=1 - i),))
                    for i, c in enumerate(requests[0].completions)
                )
            ]

    scorer = RetryingScorer(
        Halves(), attempts=2, tolerated=1.0, report=lambda *_: None, first_wait_s=1e-4
    )
    [outcomes] = asyncio.run(scorer.score([request("x", "y", "z")]))
    told = [[(r.text, r.against) for r in o.replies] for o in outcomes if isinstance(o, Scored)]
    assert told == [[], [("y", 2)], [("z", 1)]]


# ---------------------------------------------------------------------------------- in the run


def test_journal_restores_words(tmp_path: Path) -> None:
    scored = Scored(value=0.1, replies=(JudgeReply(text=CLEAN, part="a/b", left_out=True),))
    compared = Compared(
        win=EVEN, source="pairwise", replies=((JudgeReply(text="x", against=1),), ())
    )
    asked = request("a", "b")
    other = replace(asked, number=1)
    journal = Journal(tmp_path / "j")
    journal.add(SCORE, [asked], [(scored, Scored(value=1.0, parts={"p": 2.0}))])
    journal.add(COMPARE, [other], [compared])
    journal.close()
    again = Journal(tmp_path / "j")
    assert again.recall(SCORE, asked) == (scored, Scored(value=1.0, parts={"p": 2.0}))
    restored = again.recall(COMPARE, other)
    assert isinstance(restored, Compared) and restored.replies == compared.replies


class Chatty(FakeScorer):
    """A judge whose words are never the same twice, though its scores are."""

    said = 0

    async def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        rows = await super().score(requests)
        return [
            tuple(replace(o, replies=(self._reply(),)) if isinstance(o, Scored) else o for o in row)
            for row in rows
        ]

    async def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        compared = await super().compare(requests)
        return [
            replace(c, replies=tuple((self._reply(against=0),) for _ in r.completions))
            if isinstance(c, Compared)
            else c
            for c, r in zip(compared, requests, strict=True)
        ]

    def _reply(self, against: int | None = None) -> JudgeReply:
        type(self).said += 1
        return JudgeReply(text=f"reply {self.said}", part="judge", against=against)


def replies_in(table: Path) -> list[list[dict[str, Any]]]:
    found: list[list[dict[str, Any]]] = pq.read_table(table)["replies"].to_pylist()
    return found


@pytest.mark.parametrize("algorithm", ["online_dpo", "sppo"])
def test_words_are_in_the_tables_and_a_resumed_run_has_those_of_before(
    tmp_path: Path, algorithm: str
) -> None:
    config = make_config(
        tmp_path,
        algorithm={"type": algorithm, "samples": 4},
        run={"iterations": 1, "eval_every": 1},
    )
    with pytest.raises(RuntimeError, match="killed"):
        run_campaign(config, scorer=Chatty(), learner=FakeLearner(fail_at=0))
    before = replies_in(config.run.dir / "samples/iteration-000001.parquet")
    assert len(before) == 16 and all(len(replies) == 1 for replies in before)
    assert len({replies[0]["text"] for replies in before}) == 16
    against = None if algorithm == "online_dpo" else 0
    assert {(r["part"], r["against"], r["left_out"]) for [r] in before} == {
        ("judge", against, False)
    }
    assert all(replies_in(config.run.dir / "heldout/iteration-000000.parquet"))
    run_campaign(config, scorer=Chatty())
    assert replies_in(config.run.dir / "samples/iteration-000001.parquet") == before

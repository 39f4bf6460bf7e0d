"""A scorer behind gRPC returns the same as in this process; an error is never a score."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from serving import HERE, SETUP, Lengths, grpc_entry, request, scores, serve

from rayhf.config.scorers import LogSigmoid
from rayhf.config.serve import ServedScorersConfig
from rayhf.config.service import EndpointSecurity, ServiceConfig
from rayhf.errors import ConfigError, UnreachableError
from rayhf.scorer.build import build_scorer, check_entries
from rayhf.scorer.grpc import scorer_pb2 as pb
from rayhf.scorer.grpc.client import GrpcScorer, GrpcScorerConfig, split
from rayhf.scorer.grpc.messages import SERVICE
from rayhf.scorer.grpc.scorer_pb2_grpc import (
    ScorerServicer,
    ScorerStub,
    add_ScorerServicer_to_server,
)
from rayhf.scorer.rule_config import PairwiseRuleConfig, RuleConfig
from rayhf.service.chat_pb2 import Message
from rayhf.service.client import Client
from rayhf.service.server import Server
from rayhf.types import Compared, Failed, Invalid, Scored, Skipped

RIGHT = RuleConfig(function="rayhf.tiny.arithmetic:correct", name="right")
BEATS = PairwiseRuleConfig(function="rayhf.tiny.game:beats")


# --------------------------------------------------------------------------------- the same answers


def both(entries):
    """Return the scorer in this process, a server of it, and its client."""
    here = build_scorer(entries, SETUP)
    server = serve(here, pairwise=entries[0].is_pairwise)
    there = build_scorer([grpc_entry(server, pairwise=entries[0].is_pairwise, batch=4)], SETUP)
    return here, server, there


def test_rule_scores_the_same_behind_the_service():
    here, server, there = both(
        [RIGHT, RuleConfig(function="rayhf.scorer.rules:final_number", weight=0.25)]
    )
    requests = [request("1 + 3 = 4", "3", "three", number=n) for n in range(5)] + [
        request(),
        request("3", answer=None),
    ]
    try:
        local = here.score(requests)
        remote = there.score(requests)
        assert [[type(o) for o in row] for row in local] == [
            [type(o) for o in row] for row in remote
        ]
        assert {type(o) for row in local for o in row} == {Scored, Failed}
        for near, far in zip(local, remote, strict=True):
            for one, other in zip(near, far, strict=True):
                if isinstance(one, Scored):
                    assert other.value == one.value
                    assert other.parts == {"grpc": one.value} | {
                        f"grpc/{k}": v for k, v in one.parts.items()
                    }
                else:
                    assert one.reason in other.reason and other.transient == one.transient
        for near, far in zip(here.compare(requests[:5]), there.compare(requests[:5]), strict=True):
            np.testing.assert_array_equal(near.win, far.win)
            assert near.source == far.source == "pointwise"
    finally:
        server.stop()
        there.close()
        here.close()


def test_pairwise_rule_compares_the_same_behind_the_service():
    here, server, there = both([BEATS])
    requests = [request("rock", "paper", "scissors", "well", number=n) for n in range(3)]
    try:
        for near, far in zip(here.compare(requests), there.compare(requests), strict=True):
            np.testing.assert_array_equal(near.win, far.win)
            assert near.source == far.source == "pairwise"
        assert scores(there, requests) == scores(here, requests)
    finally:
        server.stop()
        there.close()
        here.close()


def test_served_scorer_receives_all_fields():
    """Prompt id, messages, the answer or that there is none, row, source, why the text ended."""
    seen = []

    class Curious(Lengths):
        def score(self, requests):
            seen.extend(requests)
            return super().score(requests)

    server = serve(Curious())
    engine = GrpcScorer(grpc_entry(server), SETUP)
    try:
        sent = request("a", answer=None)
        row = {"level": 3, "tags": ["é", None], "nested": {"x": 0.5}}
        prompt = replace(sent.prompt, row=row, source="math")
        thought = tuple(replace(c, thinking="hm") for c in sent.completions)
        engine.score(
            [
                replace(sent, prompt=prompt, completions=thought),
                request("b", answer="", finish_reason="length"),
            ]
        )
        first, second = sorted(seen, key=lambda r: r.completions[0].text)
        assert (
            first.prompt.messages == request("a").prompt.messages and first.prompt.prompt_id == "p0"
        )
        assert (first.prompt.reference_answer, second.prompt.reference_answer) == (None, "")
        assert (first.prompt.row, first.prompt.source) == (row, "math")
        assert (second.prompt.row, second.prompt.source) == ({}, "")
        assert [r.completions[0].finish_reason for r in (first, second)] == ["stop", "length"]
        assert [r.completions[0].thinking for r in (first, second)] == ["hm", None]
    finally:
        engine.close()
        server.stop()


def test_normalize_is_refused_by_servers_and_accepted_by_clients():
    with pytest.raises(ValidationError, match="entry 1 has normalize"):
        ServedScorersConfig(train=(RIGHT, RuleConfig(function="a:b", normalize=True)))
    assert GrpcScorerConfig(endpoints=("localhost:1",), normalize=True).normalize
    with pytest.raises(ValidationError, match="a pairwise service gives probabilities"):
        GrpcScorerConfig(
            endpoints=("localhost:1",), pairwise=True, transform=LogSigmoid(reference=0.0)
        )
    with pytest.raises(ValidationError, match=r"is on another machine: set security\.ca"):
        GrpcScorerConfig(endpoints=("localhost:1", "gpu-7:50051"))


# -------------------------------------------------------------------------------------------- calls


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 300)), max_size=20),
    st.integers(1, 12),
    st.integers(400, 2000),
)
@settings(deadline=None, max_examples=50)
def test_calls_contain_every_request_once_in_order(sizes, completions, max_bytes):
    requests = [
        pb.ScoreRequest(completions=[pb.Completion(text="x" * long)] * count)
        for count, long in sizes
    ]
    requests = [r for r in requests if r.ByteSize() < max_bytes - 32]
    calls = list(split(requests, completions=completions, max_bytes=max_bytes))
    assert [index for call in calls for index in call] == list(range(len(requests)))
    for call in calls:
        assert pb.ScoreRequests(requests=[requests[i] for i in call]).ByteSize() <= max_bytes
        assert len(call) == 1 or sum(len(requests[i].completions) for i in call) <= completions


def test_completions_are_sent_in_batches_without_invalid_text():
    engine = Lengths()
    server = serve(engine)
    scorer = GrpcScorer(grpc_entry(server, batch=6, max_message_mib=1), SETUP)
    try:
        requests = [request("a", "bb", number=n) for n in range(7)] + [
            request("\ud800", "b"),
            request("x" * (1 << 20)),
        ]
        results = scorer.score(requests)
        assert results[:7] == [(Scored(value=1.0), Scored(value=2.0))] * 7 and engine.calls == 3
        assert all(isinstance(o, Invalid) and "UTF-8" in o.reason for o in results[7])
        [large] = results[8]
        assert (
            isinstance(large, Failed)
            and not large.transient
            and "a call takes 1,048,560" in large.reason
        )
    finally:
        scorer.close()
        server.stop()


@pytest.mark.parametrize("verb", ["score", "compare"])
def test_scorer_with_a_bug_is_failed_for_good(verb):
    class Broken(Lengths):
        def score(self, requests):
            raise KeyError("bug")

        compare = score

    server = serve(Broken())
    scorer = GrpcScorer(grpc_entry(server), SETUP)
    try:
        [answer] = getattr(scorer, verb)([request("a")])
        answer = answer[0] if verb == "score" else answer
        assert isinstance(answer, Failed) and not answer.transient and "'bug'" in answer.reason
    finally:
        scorer.close()
        server.stop()


def test_failure_of_a_call_that_succeeded_before_is_final():
    class Fragile(Lengths):
        works = True

        def score(self, requests):
            if not self.works or any(c.text == "poison" for r in requests for c in r.completions):
                raise RuntimeError("out of memory")
            return super().score(requests)

    engine = Fragile()
    errors = []
    server = serve(engine, broken=errors.append)
    client = build_scorer([grpc_entry(server)], SETUP)
    try:
        assert client.score([request("four")])[0][0].value == 4.0
        assert isinstance(client.score([request("poison")])[0][0], Failed) and errors == []
        assert client.score([request("five!")])[0][0].value == 5.0
        engine.works = False
        assert isinstance(client.score([request("four")])[0][0], Failed)
        assert [str(error) for error in errors] == ["out of memory"] * len(errors) and errors
    finally:
        client.close()
        server.stop()


def test_requests_that_no_scorer_could_read_are_refused():
    server = serve(Lengths())
    client = Client(server.address, EndpointSecurity(), base=HERE)
    try:
        no_messages = pb.ScoreRequest(prompt=pb.Prompt(prompt_id="p"), completions=[])
        with pytest.raises(ConfigError, match=r"requests\[0\]: the prompt has no messages"):
            client.call(
                ScorerStub(client.channel).Score,
                pb.ScoreRequests(requests=[no_messages]),
                timeout_s=5,
            )
        no_reason = pb.ScoreRequest(
            prompt=pb.Prompt(messages=[Message(role="user")]), completions=[pb.Completion()]
        )
        with pytest.raises(ConfigError, match=r"requests\[0\]\.completions\[0\]: finish_reason 0"):
            client.call(
                ScorerStub(client.channel).Compare,
                pb.ScoreRequests(requests=[no_reason]),
                timeout_s=5,
            )
    finally:
        client.close()
        server.stop()


# ------------------------------------------------------------------------------ what is not a score


class Scripted(ScorerServicer):
    """A foreign service with one reply to everything."""

    def __init__(self, reply):
        self.reply = reply

    def Score(self, request, context):  # noqa: N802 - gRPC's name
        return self.reply

    Compare = Score


def result_of(reply, *, pairwise, completions=2):
    """Return the campaign's result where a service sends this reply to one request."""
    server = Server(
        ServiceConfig(),
        {SERVICE: partial(add_ScorerServicer_to_server, Scripted(reply))},
        base=HERE,
    )
    server.start()
    engine = build_scorer([grpc_entry(server, pairwise=pairwise)], SETUP)
    try:
        requests = [request(*"ab"[:completions])]
        return engine.compare(requests)[0] if pairwise else engine.score(requests)[0]
    finally:
        engine.close()
        server.stop()


def scored(*values, **parts):
    return pb.Outcomes(
        outcomes=[pb.Outcome(scored=pb.Scored(value=value, parts=parts)) for value in values]
    )


@pytest.mark.parametrize(
    ("results", "kinds", "reason"),
    [
        ([scored(1.0, math.nan)], [Scored, Invalid], "the score is nan"),
        ([scored(math.inf, -math.inf)], [Invalid, Invalid], "the score is inf"),
        (
            [pb.Outcomes(outcomes=[pb.Outcome(skipped=pb.Skipped(reason="None"))] * 2)],
            [Skipped, Skipped],
            "skipped by all scorers that judge it (grpc)",
        ),
        ([scored(1.0, 2.0, part=math.nan)], [Invalid, Invalid], "with parts {'part': nan}"),
        ([scored(1.0)], [Failed, Failed], "1 scores for 2 completions"),
        ([scored(1.0, 2.0, 3.0)], [Failed, Failed], "3 scores for 2 completions"),
        ([], [Failed, Failed], "returned 0 results for 1 requests"),
        ([scored(1.0, 2.0)] * 2, [Failed, Failed], "returned 2 results for 1 requests"),
        ([pb.Outcomes(outcomes=[pb.Outcome()] * 2)], [Failed, Failed], "an outcome of no kind"),
        (
            [
                pb.Outcomes(
                    outcomes=[pb.Outcome(invalid=pb.Invalid(reason="\x1b[31m\nred" + "x" * 9999))]
                    * 2
                )
            ],
            [Invalid, Invalid],
            "grpc: ?[31m redxx",
        ),
    ],
)
def test_invalid_score_replies(results, kinds, reason):
    outcomes = result_of(pb.ScoreReply(results=results), pairwise=False)
    assert [type(o) for o in outcomes] == kinds
    said = next(o.reason for o in outcomes if not isinstance(o, Scored))
    assert reason in said and len(said) < 500


def matrix(*win, source=pb.SOURCE_PAIRWISE):
    return [pb.Comparison(compared=pb.Compared(win=win, source=source))]


@pytest.mark.parametrize(
    ("results", "kind", "reason"),
    [
        (matrix(0.5, 0.7, 0.3, 0.5), Compared, ""),
        (matrix(0.5, 0.7, 0.3), Failed, "a matrix of 3 numbers, expected 2 x 2"),
        (matrix(0.5, 0.7, 0.7, 0.5), Failed, "not mirrored"),
        (matrix(0.5, 1.7, -0.7, 0.5), Failed, "expected probabilities"),
        (matrix(0.5, math.inf, -math.inf, 0.5), Failed, "expected probabilities"),
        (matrix(0.5, math.nan, math.nan, 0.5), Invalid, "compared no two completions"),
        (matrix(0.5, 0.7, 0.3, 0.5, source=pb.SOURCE_UNSPECIFIED), Failed, "source 0"),
        ([], Failed, "returned 0 results for 1 requests"),
        ([pb.Comparison()], Failed, "a comparison of no kind"),
        ([pb.Comparison(failed=pb.Failed(reason="gone", transient=True))], Failed, "gone"),
    ],
)
def test_invalid_comparison_replies(results, kind, reason):
    comparison = result_of(pb.CompareReply(results=results), pairwise=True)
    assert type(comparison) is kind and reason in getattr(comparison, "reason", "")


# --------------------------------------------------------------------------------- before it starts


def refused(entry, message, error=ConfigError):
    with pytest.raises(error, match=rf"^scorer\.train\[0\]: .*{message}") as error:
        check_entries([entry], Path())
    assert "\n" not in str(error.value)


def test_check_queries_the_services(caplog):
    points, pairs, other = (
        serve(Lengths()),
        serve(Lengths(), names=("pairs",), pairwise=True),
        serve(Lengths(), names=("other",)),
    )
    try:
        check_entries([grpc_entry(points)], Path())
        check_entries([grpc_entry(pairs, pairwise=True)], Path())
        refused(
            grpc_entry(pairs), "serves pairs, which compares completions; expected pairwise: true"
        )
        refused(
            grpc_entry(points, pairwise=True),
            "serves lengths, which scores each completion; expected pairwise: false",
        )
        refused(grpc_entry(points, other), "serves lengths, but .* serves other; expected the same")
        other.stop()
        check_entries([grpc_entry(points, other)], Path())
        assert "is unreachable, the others serve without it" in caplog.text
        refused(grpc_entry(other), "no service can be reached: .*unavailable", UnreachableError)
    finally:
        points.stop()
        pairs.stop()


def test_check_reports_a_missing_token(tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    server = serve(Lengths(), token_file=token)
    try:
        refused(grpc_entry(server), "unauthenticated: the token is missing or wrong")
        check_entries([grpc_entry(server, security={"token_file": token})], Path())
    finally:
        server.stop()

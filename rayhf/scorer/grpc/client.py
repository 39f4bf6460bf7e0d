"""Scorers that run elsewhere, behind `rayhf serve-scorer`, as one engine.

In: ScoreRequests. Out: what the services said, or Failed. The requests are cut into calls of about
`batch` completions within the message limit; many calls are under way at a time, over all endpoints
(endpoints.py). A call that fails is repeated a few times, at another endpoint where there is one,
after a jittered wait; then its completions are Failed, `transient` where the service could not be
reached: rayhf/scorer/retrying.py waits for it. No score is ever made up for one that did not come.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from rayhf.config.scorers import GrpcScorerConfig
from rayhf.errors import ConfigError, ServiceError, UnreachableError
from rayhf.scorer.grpc import scorer_pb2 as pb
from rayhf.scorer.grpc.endpoints import Endpoints
from rayhf.scorer.grpc.messages import SERVICE, decode_comparison, decode_outcomes, encode_request
from rayhf.scorer.grpc.scorer_pb2_grpc import ScorerStub
from rayhf.service.client import Client, printable
from rayhf.types import Comparison, Failed, Invalid, Outcome, ScoreRequest

logger = logging.getLogger(__name__)
Verb = Callable[[ScorerStub], Callable[..., Any]]

ATTEMPTS = 3
"""Calls at most for one batch."""
FIRST_WAIT_S, MAX_WAIT_S = 0.1, 2.0
"""Between them: random, up to a limit that doubles."""
CHECK_TIMEOUT_S = 5.0
_FRAME = 16
"""Bytes at most that a request adds to a call beside its own."""


class GrpcScorer:
    """See the module's docstring; the settings are those of GrpcScorerConfig. Connects at the first
    call. Raises ConfigError for tokens and certificates that cannot be used."""

    def __init__(self, entry: GrpcScorerConfig, *, base: Path, first_rest_s: float = 1.0) -> None:
        self._entry = entry
        clients = _clients(entry, base)
        self._stubs = {client: ScorerStub(client.channel) for client in clients}
        self._endpoints = Endpoints(
            clients, service=SERVICE, in_flight=entry.in_flight, first_rest_s=first_rest_s
        )
        self._pool = ThreadPoolExecutor(
            len(clients) * entry.in_flight, thread_name_prefix="remote scorer"
        )

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        def read(
            answer: pb.Outcomes | Invalid | Failed, request: ScoreRequest
        ) -> tuple[Outcome, ...]:
            return (
                decode_outcomes(answer)
                if isinstance(answer, pb.Outcomes)
                else (answer,) * len(request.completions)
            )

        answers = self._ask(lambda stub: stub.Score, requests)
        return [read(answer, request) for answer, request in zip(answers, requests, strict=True)]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        def read(answer: pb.Comparison | Invalid | Failed, request: ScoreRequest) -> Comparison:
            return (
                decode_comparison(answer, len(request.completions))
                if isinstance(answer, pb.Comparison)
                else answer
            )

        answers = self._ask(lambda stub: stub.Compare, requests)
        return [read(answer, request) for answer, request in zip(answers, requests, strict=True)]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._endpoints.close()

    def _ask(self, verb: Verb, requests: Sequence[ScoreRequest]) -> list[Any]:
        """For each request the service's answer, a message, or why there is none: Invalid or
        Failed."""
        limit = (self._entry.max_message_mib << 20) - _FRAME
        answers: list[Any] = [_encode(request, limit) for request in requests]
        asked = [
            index for index, answer in enumerate(answers) if isinstance(answer, pb.ScoreRequest)
        ]
        calls = list(
            cut([answers[index] for index in asked], completions=self._entry.batch, max_bytes=limit)
        )
        messages = [[answers[asked[place]] for place in call] for call in calls]
        replies = self._pool.map(lambda message: self._call(verb, message), messages)
        for call, reply in zip(calls, replies, strict=True):
            for place, answer in zip(call, reply, strict=True):
                answers[asked[place]] = answer
        return answers

    def _call(self, verb: Verb, messages: Sequence[pb.ScoreRequest]) -> Sequence[Any]:
        """One answer per message, whatever happens."""
        request, tried = pb.ScoreRequests(requests=messages), set[Client]()

        def at(client: Client) -> Any:
            return client.call(verb(self._stubs[client]), request, timeout_s=self._entry.timeout_s)

        again = Retrying(
            retry=retry_if_exception_type(ServiceError),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=MAX_WAIT_S),
            reraise=True,
        )
        try:
            answers: Sequence[Any] = again(self._endpoints.ask, at, tried).answers
        except (ServiceError, ConfigError) as error:
            return [Failed(reason=str(error), transient=isinstance(error, UnreachableError))] * len(
                messages
            )
        if len(answers) != len(messages):
            return [
                Failed(reason=f"the service answered {len(answers)} of {len(messages)} requests")
            ] * len(messages)
        return answers


def _encode(request: ScoreRequest, limit: int) -> pb.ScoreRequest | Invalid | Failed:
    try:
        message = encode_request(request)
    except UnicodeEncodeError as error:
        return Invalid(reason=f"the text cannot be encoded as UTF-8: {error.reason}")
    if message.ByteSize() > limit:
        return Failed(
            reason=f"one prompt's completions are {message.ByteSize():,} bytes, a call takes {limit:,}"
        )
    return message


def cut(
    requests: Sequence[pb.ScoreRequest], *, completions: int, max_bytes: int
) -> Iterator[list[int]]:
    """Consecutive indices, call by call: as many as fit within both limits, or one that has more
    completions alone."""
    call: list[int] = []
    held = size = 0
    for index, request in enumerate(requests):
        more, larger = len(request.completions), request.ByteSize() + _FRAME
        if call and (held + more > completions or size + larger > max_bytes):
            yield call
            call, held, size = [], 0, 0
        call.append(index)
        held, size = held + more, size + larger
    if call:
        yield call


def check_endpoints(entry: GrpcScorerConfig, *, base: Path) -> None:
    """Ask every endpoint what it serves, all at once, for CHECK_TIMEOUT_S at most each. One that
    cannot be reached is only warned of while another can.

    Raises UnreachableError where none can be reached; ConfigError where one refuses us, or they do
    not serve what the entry says, or not the same.
    """
    clients = _clients(entry, base)
    try:
        with ThreadPoolExecutor(len(clients)) as pool:
            found = dict(zip(entry.endpoints, pool.map(_describe, clients), strict=True))
    finally:
        for client in clients:
            client.close()
    away = {
        endpoint: error for endpoint, error in found.items() if isinstance(error, UnreachableError)
    }
    served = {
        endpoint: reply for endpoint, reply in found.items() if isinstance(reply, pb.DescribeReply)
    }
    if not served:
        raise UnreachableError(f"no service can be reached: {next(iter(away.values()))}")
    for error in away.values():
        logger.warning("a scorer service cannot be reached, the others go on without it: %s", error)
    first, wanted = next(iter(served.items()))
    for endpoint, reply in served.items():
        names = ", ".join(map(printable, reply.names))
        if reply.pairwise != entry.pairwise:
            does = "compares answers" if reply.pairwise else "gives each answer a score"
            raise ConfigError(
                f"{endpoint} serves {names}, which {does}; expected pairwise: {str(reply.pairwise).lower()}"
            )
        if reply.names != wanted.names:
            other = ", ".join(map(printable, wanted.names))
            raise ConfigError(
                f"{first} serves {other}, but {endpoint} serves {names}; expected the same everywhere"
            )


def _describe(client: Client) -> pb.DescribeReply | UnreachableError:
    try:
        client.check_health(SERVICE, timeout_s=CHECK_TIMEOUT_S)
        reply: pb.DescribeReply = client.call(
            ScorerStub(client.channel).Describe, pb.DescribeRequest(), timeout_s=CHECK_TIMEOUT_S
        )
        return reply
    except UnreachableError as error:
        return error
    except ServiceError as error:
        raise ConfigError(str(error)) from None


def _clients(entry: GrpcScorerConfig, base: Path) -> list[Client]:
    return [
        Client(endpoint, entry.security, base=base, max_message_mib=entry.max_message_mib)
        for endpoint in entry.endpoints
    ]

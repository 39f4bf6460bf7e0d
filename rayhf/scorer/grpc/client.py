"""Scorers behind `rayhf serve-scorer`, on other machines or in other processes, as one scorer.

In: ScoreRequests. Out: the services' outcomes, or Failed. Requests are split into calls of about
`batch` completions within the message limit; many calls are in flight at a time, over all endpoints
(endpoints.py). A call that fails is retried a few times, at another endpoint where there is one,
after a jittered wait; then its completions are Failed, `transient` where the service was
unreachable: rayhf/scorer/retrying.py waits for it. No score is ever made up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from rayhf.config.scorers import PointwiseEntryConfig
from rayhf.config.service import NO_SECURITY, EndpointSecurity, split_endpoint
from rayhf.errors import ConfigError, ServiceError, UnreachableError
from rayhf.scorer.comparisons import Problem
from rayhf.scorer.grpc import scorer_pb2 as pb
from rayhf.scorer.grpc.endpoints import Endpoints
from rayhf.scorer.grpc.messages import SERVICE, decode_comparison, decode_outcomes, encode_request
from rayhf.scorer.grpc.scorer_pb2_grpc import ScorerStub
from rayhf.scorer.protocol import BaseScorer, ScorerSetup
from rayhf.service.client import Client, printable
from rayhf.types import Comparison, Failed, Invalid, Outcome, ScoreRequest

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Maximum number of calls for one batch."""
FIRST_WAIT_S = 0.1
MAX_WAIT_S = 2.0
"""Wait between them: random, up to a limit that doubles from the first to the second."""
CHECK_TIMEOUT_S = 5.0
_FRAME_BYTES = 16
"""Limit on what a request adds to a call beside its own size."""

R = TypeVar("R", covariant=True)


class Reply(Protocol[R]):
    """A service's reply: one result per request."""

    @property
    def results(self) -> Sequence[R]:
        """In the order of the requests."""
        ...


Verb = Callable[[ScorerStub], Callable[[pb.ScoreRequests], Reply[R]]]
"""The method of a stub."""


class GrpcScorerConfig(PointwiseEntryConfig):
    """Scorers behind `rayhf serve-scorer`, at one endpoint or at several that serve the same."""

    type: str = "grpc"
    endpoints: tuple[str, ...] = Field(min_length=1)
    """host:port each."""
    pairwise: bool = False
    """The service compares completions by itself; `rayhf check` asks it whether that is so."""
    security: EndpointSecurity = NO_SECURITY
    timeout_s: PositiveFloat = 60.0
    """Limit on one call, in seconds."""
    batch: PositiveInt = 64
    """Completions per call; all of one prompt's go together."""
    in_flight: PositiveInt = 4
    """Calls in flight at one endpoint."""
    max_message_mib: PositiveInt = 16
    """Limit on one call; the service's own limit, or less."""

    @property
    def compares(self) -> bool:
        """Whether it reads two completions at a time."""
        return self.pairwise

    @property
    def is_concurrent(self) -> bool:
        """Whether several calls may run at the same time."""
        return True

    @model_validator(mode="after")
    def _check_endpoints(self) -> GrpcScorerConfig:
        for endpoint in self.endpoints:
            split_endpoint(endpoint, self.security)
        if self.is_pairwise and (self.transform is not None or self.normalize):
            raise ValueError(
                "transform and normalize are for scores; a pairwise service gives probabilities"
            )
        return self


class GrpcScorer(BaseScorer[GrpcScorerConfig]):
    """Scorers that run elsewhere, behind `rayhf serve-scorer`.

    Connects at the first call. Raises ConfigError for tokens and certificates that cannot be used.
    """

    Config = GrpcScorerConfig

    def __init__(
        self, config: GrpcScorerConfig, setup: ScorerSetup, *, first_rest_s: float = 1.0
    ) -> None:
        super().__init__(config, setup)
        clients = _clients(config, setup.base)
        self._stubs = {client: ScorerStub(client.channel) for client in clients}
        self._endpoints = Endpoints(
            clients, service=SERVICE, in_flight=config.in_flight, first_rest_s=first_rest_s
        )
        self._pool = ThreadPoolExecutor(
            len(clients) * config.in_flight, thread_name_prefix="grpc scorer"
        )

    @classmethod
    def check(cls, config: GrpcScorerConfig, base: Path) -> None:
        """Ask every endpoint what it serves, all at once, for CHECK_TIMEOUT_S at most each.

        An unreachable endpoint is only a warning while another responds. Raises UnreachableError
        where none responds; ConfigError where one refuses us, or they do not serve what the entry
        says, or not the same.
        """
        clients = _clients(config, base)
        try:
            with ThreadPoolExecutor(len(clients)) as pool:
                replies = list(pool.map(_describe, clients))
        finally:
            for client in clients:
                client.close()
        unreachable = [reply for reply in replies if isinstance(reply, UnreachableError)]
        served = {
            endpoint: reply
            for endpoint, reply in zip(config.endpoints, replies, strict=True)
            if isinstance(reply, pb.DescribeReply)
        }
        if not served:
            raise UnreachableError(f"no service can be reached: {unreachable[0]}")
        for error in unreachable:
            logger.warning(
                "a scorer service is unreachable, the others serve without it: %s", error
            )
        _check_same(served, pairwise=config.pairwise)

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[Outcome, ...]]:
        """Return the services' outcomes, or why there are none."""
        results: list[pb.Outcomes | Problem] = self._call_all(lambda stub: stub.Score, requests)
        return [
            decode_outcomes(result)
            if isinstance(result, pb.Outcomes)
            else (result,) * len(request.completions)
            for result, request in zip(results, requests, strict=True)
        ]

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return the services' comparisons, or why there are none."""
        results: list[pb.Comparison | Problem] = self._call_all(lambda stub: stub.Compare, requests)
        return [
            decode_comparison(result, len(request.completions))
            if isinstance(result, pb.Comparison)
            else result
            for result, request in zip(results, requests, strict=True)
        ]

    def close(self) -> None:
        """Drop calls that have not begun, and close the connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._endpoints.close()

    def _call_all(self, verb: Verb[R], requests: Sequence[ScoreRequest]) -> list[R | Problem]:
        """Return the service's result of each request, or why there is none."""
        limit = (self.config.max_message_mib << 20) - _FRAME_BYTES
        results: dict[int, R | Problem] = {}
        sent: list[int] = []
        messages: list[pb.ScoreRequest] = []
        for index, request in enumerate(requests):
            message = _encode(request, limit)
            if isinstance(message, pb.ScoreRequest):
                sent.append(index)
                messages.append(message)
            else:
                results[index] = message
        calls = list(split(messages, completions=self.config.batch, max_bytes=limit))
        batches = [[messages[place] for place in call] for call in calls]
        replies = self._pool.map(lambda batch: self._call(verb, batch), batches)
        for call, reply in zip(calls, replies, strict=True):
            results |= {sent[place]: result for place, result in zip(call, reply, strict=True)}
        return [results[index] for index in range(len(requests))]

    def _call(self, verb: Verb[R], messages: Sequence[pb.ScoreRequest]) -> Sequence[R | Problem]:
        """Return one result per message, whatever happens."""
        request = pb.ScoreRequests(requests=messages)
        tried: set[Client] = set()

        def call(client: Client) -> Reply[R]:
            method = verb(self._stubs[client])
            reply: Reply[R] = client.call(method, request, timeout_s=self.config.timeout_s)
            return reply

        retrying = Retrying(
            retry=retry_if_exception_type(ServiceError),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=MAX_WAIT_S),
            reraise=True,
        )
        try:
            results: Sequence[R] = retrying(self._endpoints.call, call, tried).results
        except (ServiceError, ConfigError) as error:
            transient = isinstance(error, UnreachableError)
            return [Failed(reason=str(error), transient=transient)] * len(messages)
        if len(results) != len(messages):
            reason = f"the service returned {len(results)} results for {len(messages)} requests"
            return [Failed(reason=reason)] * len(messages)
        return results


def _encode(request: ScoreRequest, limit: int) -> pb.ScoreRequest | Problem:
    try:
        message = encode_request(request)
    except UnicodeEncodeError as error:
        return Invalid(reason=f"the text cannot be encoded as UTF-8: {error.reason}")
    size = message.ByteSize()
    if size > limit:
        return Failed(reason=f"one prompt's completions are {size:,} bytes, a call takes {limit:,}")
    return message


def split(
    requests: Sequence[pb.ScoreRequest], *, completions: int, max_bytes: int
) -> Iterator[list[int]]:
    """Yield consecutive indices, call by call: as many as fit within both limits.

    A request with more completions than that has a call of its own.
    """
    call: list[int] = []
    count = 0
    size = 0
    for index, request in enumerate(requests):
        more = len(request.completions)
        larger = request.ByteSize() + _FRAME_BYTES
        if call and (count + more > completions or size + larger > max_bytes):
            yield call
            call = []
            count = 0
            size = 0
        call.append(index)
        count += more
        size += larger
    if call:
        yield call


def _check_same(served: dict[str, pb.DescribeReply], *, pairwise: bool) -> None:
    """Raise ConfigError unless all endpoints serve the same, and what the entry says."""
    first, expected = next(iter(served.items()))
    for endpoint, reply in served.items():
        names = ", ".join(map(printable, reply.names))
        if reply.pairwise != pairwise:
            does = "compares completions" if reply.pairwise else "scores each completion"
            raise ConfigError(
                f"{endpoint} serves {names}, which {does}; "
                f"expected pairwise: {str(reply.pairwise).lower()}"
            )
        if reply.names != expected.names:
            others = ", ".join(map(printable, expected.names))
            raise ConfigError(
                f"{first} serves {others}, but {endpoint} serves {names}; "
                "expected the same everywhere"
            )


def _describe(client: Client) -> pb.DescribeReply | UnreachableError:
    try:
        client.check_health(SERVICE, timeout_s=CHECK_TIMEOUT_S)
        reply: pb.DescribeReply = client.call(
            ScorerStub(client.channel).Describe, pb.DescribeRequest(), timeout_s=CHECK_TIMEOUT_S
        )
    except UnreachableError as error:
        return error
    except ServiceError as error:
        raise ConfigError(str(error)) from None
    return reply


def _clients(config: GrpcScorerConfig, base: Path) -> list[Client]:
    return [
        Client(endpoint, config.security, base=base, max_message_mib=config.max_message_mib)
        for endpoint in config.endpoints
    ]

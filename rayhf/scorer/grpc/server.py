"""The scorer service's end: calls in, the scorers' answers out.

In: the scorers that `rayhf serve-scorer` built. A call waits for its turn: the engines have one
caller at a time, and batch what that one brings. A call whose client has gone, or whose deadline
passed while it waited, costs the engines nothing.

An engine that raises may have met its first impossible answer, or be broken for good. So it is
asked again what it could answer before; where it raises then too, `broken` is told, and the server
is to end: whoever started it starts another.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from rayhf import __version__
from rayhf.config.service import ServiceConfig
from rayhf.scorer.combine import ScorerEngine
from rayhf.scorer.comparisons import check_comparisons, check_outcomes
from rayhf.scorer.grpc import scorer_pb2 as pb
from rayhf.scorer.grpc.messages import SERVICE, decode_requests, encode_comparisons, encode_outcomes
from rayhf.scorer.grpc.scorer_pb2_grpc import ScorerServicer, add_ScorerServicer_to_server
from rayhf.service.server import Server, error_statuses

logger = logging.getLogger(__name__)


def scorer_server(
    engine: ScorerEngine,
    config: ServiceConfig,
    *,
    names: Sequence[str],
    pairwise: bool,
    base: Path,
    broken: Callable[[Exception], None] = lambda error: None,
) -> Server:
    """A server for the engine, not started yet. Raises ConfigError as Server."""
    described = pb.DescribeReply(version=__version__, names=names, pairwise=pairwise)
    register = partial(add_ScorerServicer_to_server, _Servicer(engine, described, broken))
    return Server(config, {SERVICE: register}, base=base)


class _Servicer(ScorerServicer):  # type: ignore[misc]  # generated without types
    def __init__(
        self, engine: ScorerEngine, described: pb.DescribeReply, broken: Callable[[Exception], None]
    ) -> None:
        self._engine, self._described, self._broken = engine, described, broken
        self._busy = threading.Lock()
        self._answered: Callable[[], Any] | None = None
        """The first question that was answered, to be asked again."""

    def Describe(
        self, request: pb.DescribeRequest, context: grpc.ServicerContext
    ) -> pb.DescribeReply:
        return self._described

    def Score(self, request: pb.ScoreRequests, context: grpc.ServicerContext) -> pb.ScoreReply:
        with error_statuses(context):
            requests = decode_requests(request)
            with self._turn(context):
                answers = self._ask(partial(self._engine.score, requests))
            return encode_outcomes(check_outcomes(answers, requests))

    def Compare(self, request: pb.ScoreRequests, context: grpc.ServicerContext) -> pb.CompareReply:
        with error_statuses(context):
            requests = decode_requests(request)
            with self._turn(context):
                answers = self._ask(partial(self._engine.compare, requests))
            return encode_comparisons(check_comparisons(answers, requests))

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            answers = question()
        except Exception:
            if self._answered is not None:
                try:
                    self._answered()
                except Exception as again:
                    logger.exception("a question that was answered before is not answered any more")
                    self._broken(again)
            raise
        if self._answered is None:
            self._answered = question
        return answers

    @contextmanager
    def _turn(self, context: grpc.ServicerContext) -> Iterator[None]:
        left_s = context.time_remaining()
        if not self._busy.acquire(
            timeout=threading.TIMEOUT_MAX if left_s is None else min(left_s, threading.TIMEOUT_MAX)
        ):
            context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "the scorer was busy with other calls until the deadline",
            )
        try:
            if not context.is_active():
                context.abort(grpc.StatusCode.CANCELLED, "the client has gone")
            yield
        finally:
            self._busy.release()

"""The server of the scorer service.

In: the scorers that `rayhf serve-scorer` built. Out: their results.

Synchronization: calls wait for each other, because scorers have one caller at a time, and batch
what that one sends. A call whose client is gone, or whose deadline passed while it waited, never
reaches the scorers.

A scorer that raises may have met a completion that it cannot handle, or be broken for good. So the
first call that succeeded is repeated; where that raises too, `broken` is called, and the server
must be stopped and restarted.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import grpc

from rayhf.config.service import ServiceConfig
from rayhf.scorer.comparisons import check_comparisons, check_outcomes
from rayhf.scorer.grpc import scorer_pb2 as pb
from rayhf.scorer.grpc.messages import SERVICE, decode_requests, encode_comparisons, encode_outcomes
from rayhf.scorer.grpc.scorer_pb2_grpc import ScorerServicer, add_ScorerServicer_to_server
from rayhf.scorer.protocol import ScorerEngine
from rayhf.service.server import Server, error_statuses

logger = logging.getLogger(__name__)
T = TypeVar("T")


def scorer_server(
    engine: ScorerEngine,
    config: ServiceConfig,
    *,
    names: Sequence[str],
    pairwise: bool,
    base: Path,
    broken: Callable[[Exception], None] = lambda error: None,
) -> Server:
    """Return a server for the engine, not started yet. Raises ConfigError as Server."""
    described = pb.DescribeReply(version=version("rayhf"), names=names, pairwise=pairwise)
    register = partial(add_ScorerServicer_to_server, _Servicer(engine, described, broken))
    return Server(config, {SERVICE: register}, base=base)


class _Servicer(ScorerServicer):  # type: ignore[misc]  # generated without types
    def __init__(
        self, engine: ScorerEngine, described: pb.DescribeReply, broken: Callable[[Exception], None]
    ) -> None:
        self._engine = engine
        self._described = described
        self._broken = broken
        self._busy = threading.Lock()
        self._proven: Callable[[], object] | None = None
        """The first call that succeeded."""

    def Describe(
        self, request: pb.DescribeRequest, context: grpc.ServicerContext
    ) -> pb.DescribeReply:
        return self._described

    def Score(self, request: pb.ScoreRequests, context: grpc.ServicerContext) -> pb.ScoreReply:
        with error_statuses(context):
            requests = decode_requests(request)
            with self._exclusive(context):
                outcomes = self._call(partial(self._engine.score, requests))
            return encode_outcomes(check_outcomes(outcomes, requests))

    def Compare(self, request: pb.ScoreRequests, context: grpc.ServicerContext) -> pb.CompareReply:
        with error_statuses(context):
            requests = decode_requests(request)
            with self._exclusive(context):
                comparisons = self._call(partial(self._engine.compare, requests))
            return encode_comparisons(check_comparisons(comparisons, requests))

    def _call(self, call: Callable[[], T]) -> T:
        try:
            result = call()
        except Exception:
            if self._proven is not None:
                try:
                    self._proven()
                except Exception as again:
                    logger.exception("the scorer is broken: a call that succeeded before fails now")
                    self._broken(again)
            raise
        if self._proven is None:
            self._proven = call
        return result

    @contextmanager
    def _exclusive(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Wait for the engine; abort where the client does not wait any more."""
        left_s = context.time_remaining()
        limit_s = threading.TIMEOUT_MAX if left_s is None else min(left_s, threading.TIMEOUT_MAX)
        if not self._busy.acquire(timeout=limit_s):
            context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "the scorer was busy with other calls until the deadline",
            )
        try:
            if not context.is_active():
                context.abort(grpc.StatusCode.CANCELLED, "the client is gone")
            yield
        finally:
            self._busy.release()

"""The scorer service's end: calls in, the scorers' answers out.

In: the scorers that `rayhf serve-scorer` built. A call waits for its turn: the engines have one caller at a time, and batch what
that one brings. A call whose client has gone, or whose deadline passed while it waited, costs the engines nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc

from rayhf import __version__
from rayhf.config.service import ServiceConfig
from rayhf.scorer.combine import Engine
from rayhf.scorer.pairs import check_comparisons, check_outcomes
from rayhf.service.proto import scorer_pb2 as pb
from rayhf.service.proto.scorer_pb2_grpc import ScorerServicer, add_ScorerServicer_to_server
from rayhf.service.scorer_messages import SERVICE, decode_requests, encode_comparisons, encode_outcomes
from rayhf.service.server import Server, refusals


def scorer_server(engine: Engine, config: ServiceConfig, *, names: Sequence[str], pairwise: bool, base: Path) -> Server:
    """A server for the engine, not started yet. Raises ConfigError as Server."""
    described = pb.DescribeReply(version=__version__, names=names, pairwise=pairwise)
    register = partial(add_ScorerServicer_to_server, _Servicer(engine, described))
    return Server(config, {SERVICE: register}, base=base)


class _Servicer(ScorerServicer):  # type: ignore[misc]  # generated without types
    def __init__(self, engine: Engine, described: pb.DescribeReply) -> None:
        self._engine, self._described = engine, described
        self._busy = threading.Lock()

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        return self._described

    def Score(self, request: pb.ScoreRequests, context: grpc.ServicerContext) -> pb.ScoreReply:
        with refusals(context):
            requests = decode_requests(request)
            with self._turn(context):
                answers = self._engine.score(requests)
            return encode_outcomes(check_outcomes(answers, requests))

    def Compare(self, request: pb.ScoreRequests, context: grpc.ServicerContext) -> pb.CompareReply:
        with refusals(context):
            requests = decode_requests(request)
            with self._turn(context):
                answers = self._engine.compare(requests)
            return encode_comparisons(check_comparisons(answers, requests))

    @contextmanager
    def _turn(self, context: grpc.ServicerContext) -> Iterator[None]:
        left_s = context.time_remaining()
        if not self._busy.acquire(timeout=threading.TIMEOUT_MAX if left_s is None else min(left_s, threading.TIMEOUT_MAX)):
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the scorer was busy with other calls until the deadline")
        try:
            if not context.is_active():
                context.abort(grpc.StatusCode.CANCELLED, "the client has gone")
            yield
        finally:
            self._busy.release()

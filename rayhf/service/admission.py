"""Limits on calls in progress, so that no client keeps the others, or an operator, out.

Calls above the limit are refused at once with RESOURCE_EXHAUSTED. Streams have a smaller limit, and
one per client host. Urgent methods (health checks, stop) have room of their own. A call whose
request does not arrive within REQUEST_S is ended: otherwise it would keep its thread for ever.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
REQUEST_S = 10.0
"""Seconds within which a request arrives after its call began."""
STREAMS_PER_HOST = 16
_URGENT = 8
"""Calls of each urgent method at a time."""
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in the type stubs only


class Admission(grpc.ServerInterceptor):
    """An interceptor that counts calls and refuses those above the limits.

    Args:
        limit: calls at a time; half of them may be streams.
        urgent: full names of methods that do not count, for example "/rayhf.v1.Campaign/Stop".
    """

    def __init__(self, limit: int, *, urgent: Sequence[str]) -> None:
        self.threads = limit + _URGENT * (len(urgent) + 1)
        """Size of the server's thread pool: it refuses calls with the room that is left."""
        self._limit = limit
        self._streams = max(1, limit // 2)
        self._urgent = frozenset(urgent)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the called method's handler within the limits.

        Health.Watch is not served: clients then assume that the service is healthy, and a stream
        per idle client would be all that they get.
        """
        method = handler_call_details.method
        if method == _HEALTH_WATCH:
            return None
        handler = continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        # Handlers of a request stream may end a call whose request never arrives; to the client
        # they are the same.
        codec = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._stream(handler), *codec)
        return grpc.stream_unary_rpc_method_handler(self._unary(handler, method), *codec)

    def _unary(self, handler: Handler, method: str) -> Callable[..., Any]:
        behavior = handler.unary_unary
        assert behavior is not None

        def call(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            limits = self._urgent_limit(method) or (("calls", self._limit),)
            with self._place(limits, context):
                return behavior(_only(requests, context), context)

        return call

    def _stream(self, handler: Handler) -> Callable[..., Iterator[Any]]:
        behavior = handler.unary_stream
        assert behavior is not None

        def call(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            host = str(context.peer()).rpartition(":")[0]
            limits = (
                ("calls", self._limit),
                ("streams", self._streams),
                (f"streams of {host}", STREAMS_PER_HOST),
            )
            with self._place(limits, context):
                yield from behavior(_only(requests, context), context)

        return call

    def _urgent_limit(self, method: str) -> tuple[tuple[str, int], ...]:
        return ((f"calls of {method}", _URGENT),) if method in self._urgent else ()

    @contextmanager
    def _place(
        self, limits: Sequence[tuple[str, int]], context: grpc.ServicerContext
    ) -> Iterator[None]:
        """Count a call for the duration of the block; refuse it where a limit is reached."""
        with self._lock:
            reached = [(name, most) for name, most in limits if self._counts[name] >= most]
            if not reached:
                self._counts.update(name for name, _ in limits)
        if reached:
            name, most = reached[0]
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{most} {name} in progress; try again later"
            )
        try:
            yield
        finally:
            with self._lock:
                self._counts.subtract(name for name, _ in limits)
                self._counts += Counter()  # drops zeros


def _only(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
    """Return a call's request; end the call where it does not arrive."""
    late = threading.Timer(REQUEST_S, context.cancel)
    late.daemon = True
    late.start()
    try:
        return next(requests)
    except StopIteration:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no request")
    finally:
        late.cancel()

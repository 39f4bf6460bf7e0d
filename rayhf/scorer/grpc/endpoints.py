"""Load balancing over equal services, with a circuit breaker for each.

In: one Client per endpoint. Out: the reply of the one that was called. The least busy endpoint is
called, with at most `in_flight` calls at each. An endpoint that is unreachable OPENS_AFTER times in
a row gets no calls (its circuit is open); after a while one caller probes its health, and calls
resume where it is serving. A refused call is a reply, not a failure of the endpoint.

Synchronization: a caller waits while every endpoint with a closed circuit is busy. When every
circuit is open nobody waits: the last error is raised at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rayhf.errors import ServiceError, UnreachableError
from rayhf.service.client import Client

T = TypeVar("T")

OPENS_AFTER = 3
"""Failures in a row that open a circuit."""
MAX_REST_S = 30.0
"""Limit on the time that a circuit stays open before a probe."""
PROBE_TIMEOUT_S = 2.0


@dataclass(eq=False)
class _Endpoint:
    client: Client
    rest_s: float
    """How long its circuit stays open the next time."""
    in_flight: int = 0
    failures: int = 0
    """In a row."""
    error: ServiceError | None = None
    """Why the circuit is open; None while it is closed."""
    rests_until: float = 0.0
    is_probed: bool = False
    """A caller is probing its health."""


class Endpoints:
    """The endpoints of one service, for any number of threads.

    Args:
        clients: one per endpoint.
        service: name of the service, for health probes.
        in_flight: maximum number of calls at one endpoint.
        first_rest_s: how long a circuit stays open the first time; doubled up to MAX_REST_S while
            the endpoint does not come back.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        *,
        service: str,
        in_flight: int,
        first_rest_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoints = [_Endpoint(client, first_rest_s) for client in clients]
        self._service = service
        self._in_flight = in_flight
        self._first_rest_s = first_rest_s
        self._clock = clock
        self._changed = threading.Condition()

    def call(self, call: Callable[[Client], T], tried: set[Client]) -> T:
        """Return the reply of one endpoint, one that is not in `tried` where there is a choice.

        It is added to `tried`. Raises what `call` raises; an UnreachableError counts against the
        endpoint.
        """
        endpoint = self._take(tried)
        tried.add(endpoint.client)
        try:
            reply = call(endpoint.client)
        except UnreachableError as error:
            self._count_failure(endpoint, error)
            raise
        else:
            self._count_success(endpoint)
            return reply
        finally:
            with self._changed:
                endpoint.in_flight -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Close all connections."""
        for endpoint in self._endpoints:
            endpoint.client.close()

    def _take(self, tried: set[Client]) -> _Endpoint:
        """Wait for an endpoint with a free place. Raises the last error where all are down."""
        while True:
            with self._changed:
                due = [
                    endpoint
                    for endpoint in self._endpoints
                    if endpoint.error
                    and not endpoint.is_probed
                    and self._clock() >= endpoint.rests_until
                ]
                up = [endpoint for endpoint in self._endpoints if not endpoint.error]
                free = [endpoint for endpoint in up if endpoint.in_flight < self._in_flight]
                if due:
                    due[0].is_probed = True
                elif free:
                    chosen = min(free, key=lambda e: (e.client in tried, e.in_flight))
                    chosen.in_flight += 1
                    return chosen
                elif up or any(endpoint.is_probed for endpoint in self._endpoints):
                    self._changed.wait(timeout=1.0)  # every call in flight has a deadline
                    continue
                else:
                    raise self._all_down()
            self._probe(due[0])

    def _probe(self, endpoint: _Endpoint) -> None:
        """Half open the circuit where the endpoint is healthy: one failure opens it again."""
        try:
            endpoint.client.check_health(self._service, timeout_s=PROBE_TIMEOUT_S)
        except ServiceError as error:
            self._open(endpoint, error)
        else:
            with self._changed:
                endpoint.error = None
                endpoint.failures = OPENS_AFTER - 1
        finally:
            with self._changed:
                endpoint.is_probed = False
                self._changed.notify_all()

    def _count_failure(self, endpoint: _Endpoint, error: ServiceError) -> None:
        with self._changed:
            endpoint.failures += 1
            opens = endpoint.failures >= OPENS_AFTER and endpoint.error is None
        if opens:
            self._open(endpoint, error)

    def _open(self, endpoint: _Endpoint, error: ServiceError) -> None:
        with self._changed:
            endpoint.error = error
            endpoint.rests_until = self._clock() + endpoint.rest_s
            endpoint.rest_s = min(MAX_REST_S, 2 * endpoint.rest_s)

    def _count_success(self, endpoint: _Endpoint) -> None:
        with self._changed:
            endpoint.failures = 0
            endpoint.error = None
            endpoint.rest_s = self._first_rest_s

    def _all_down(self) -> ServiceError:
        last = max(self._endpoints, key=lambda endpoint: endpoint.rests_until).error
        assert last is not None
        if len(self._endpoints) == 1:
            return last
        return type(last)(
            f"none of {len(self._endpoints)} endpoints responds; the last error: {last}"
        )

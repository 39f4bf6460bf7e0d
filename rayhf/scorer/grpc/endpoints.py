"""Which of several equal services is asked next, and which is left alone for a while.

In: one Client per endpoint. Out: answers of whichever was asked. The least busy endpoint is asked,
`in_flight` calls at most are under way at each, and whoever finds no place waits for one. An
endpoint that is not reached OPENS_AFTER times in a row is left alone (its circuit is open); after a
while one caller asks its health, and calls go there again where it says that it serves. When every
circuit is open nobody waits: the last error is raised at once. An answer that says no is an answer.
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
"""Failures in a row."""
MAX_REST_S = 30.0
PROBE_TIMEOUT_S = 2.0


@dataclass(eq=False)
class _Endpoint:
    client: Client
    rest_s: float
    """How long it is left alone next time."""
    under_way: int = 0
    failures: int = 0
    """In a row."""
    error: ServiceError | None = None
    """Why the circuit is open; None while it is closed."""
    rests_until: float = 0.0
    probed: bool = False
    """Somebody is asking its health."""


class Endpoints:
    """See the module's docstring. For any number of threads.

    Args:
        service: whose health is asked.
        first_rest_s: how long an endpoint is left alone the first time; doubled up to MAX_REST_S
        while it does not come back. clock: seconds that never go back.
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
        self._all = [_Endpoint(client, first_rest_s) for client in clients]
        self._service, self._in_flight, self._first_rest_s = service, in_flight, first_rest_s
        self._clock, self._changed = clock, threading.Condition()

    def ask(self, call: Callable[[Client], T], tried: set[Client]) -> T:
        """The answer of one endpoint, one that is not in `tried` where there is a choice; it is
        added there. Raises what `call` raises; an UnreachableError counts against the endpoint."""
        endpoint = self._take(tried)
        tried.add(endpoint.client)
        try:
            answer = call(endpoint.client)
        except UnreachableError as error:
            self._failed(endpoint, error)
            raise
        else:
            self._well(endpoint)
            return answer
        finally:
            with self._changed:
                endpoint.under_way -= 1
                self._changed.notify_all()

    def close(self) -> None:
        for endpoint in self._all:
            endpoint.client.close()

    def _take(self, tried: set[Client]) -> _Endpoint:
        while True:
            with self._changed:
                due = [
                    e
                    for e in self._all
                    if e.error and not e.probed and self._clock() >= e.rests_until
                ]
                up = [e for e in self._all if not e.error]
                free = [e for e in up if e.under_way < self._in_flight]
                if due:
                    due[0].probed = True
                elif free:
                    chosen = min(free, key=lambda e: (e.client in tried, e.under_way))
                    chosen.under_way += 1
                    return chosen
                elif up or any(e.probed for e in self._all):
                    self._changed.wait(timeout=1.0)  # every call under way has a deadline
                    continue
                else:
                    raise self._all_down()
            self._probe(due[0])

    def _probe(self, endpoint: _Endpoint) -> None:
        """Half open: health decides whether calls go there again, and the first that fails then
        closes the door again."""
        try:
            endpoint.client.check_health(self._service, timeout_s=PROBE_TIMEOUT_S)
        except ServiceError as error:
            self._rest(endpoint, error)
        else:
            with self._changed:
                endpoint.error, endpoint.failures = None, OPENS_AFTER - 1
        finally:
            with self._changed:
                endpoint.probed = False
                self._changed.notify_all()

    def _failed(self, endpoint: _Endpoint, error: ServiceError) -> None:
        with self._changed:
            endpoint.failures += 1
            opens = endpoint.failures >= OPENS_AFTER and endpoint.error is None
        if opens:
            self._rest(endpoint, error)

    def _rest(self, endpoint: _Endpoint, error: ServiceError) -> None:
        with self._changed:
            endpoint.error, endpoint.rests_until = error, self._clock() + endpoint.rest_s
            endpoint.rest_s = min(MAX_REST_S, 2 * endpoint.rest_s)

    def _well(self, endpoint: _Endpoint) -> None:
        with self._changed:
            endpoint.failures, endpoint.error, endpoint.rest_s = 0, None, self._first_rest_s

    def _all_down(self) -> ServiceError:
        last = max(self._all, key=lambda e: e.rests_until).error
        assert last is not None
        return (
            last
            if len(self._all) == 1
            else type(last)(f"none of {len(self._all)} endpoints answers; the last error: {last}")
        )

"""Services that crash, hang and come back: the others score everything, or it is Failed."""

from __future__ import annotations

import threading
import time

import pytest
from serving import HERE, SETUP, Lengths, grpc_entry, port_of, request, scores, serve

from rayhf.config.service import EndpointSecurity
from rayhf.errors import UnreachableError
from rayhf.scorer.grpc import scorer_pb2 as pb
from rayhf.scorer.grpc.client import GrpcScorer
from rayhf.scorer.grpc.endpoints import OPENS_AFTER, Endpoints
from rayhf.scorer.grpc.messages import SERVICE, encode_request
from rayhf.scorer.grpc.scorer_pb2_grpc import ScorerStub
from rayhf.service.client import Client
from rayhf.types import Failed, Scored


def test_crash_of_one_of_two_servers_loses_no_score():
    crashing = Lengths(wait_s=0.01)
    running = Lengths(wait_s=0.01)
    first = serve(crashing, grace_s=0.01)
    second = serve(running)
    scorer = GrpcScorer(grpc_entry(first, second, batch=1), SETUP)

    def kill():
        while crashing.calls < 3:
            time.sleep(0.001)
        first.stop()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        requests = [request("x" * n, number=n) for n in range(60)]
        assert scores(scorer, requests) == [float(n) for n in range(60)]
        killer.join()
        assert 3 <= crashing.calls < 60 and running.calls >= 60 - crashing.calls
    finally:
        scorer.close()
        second.stop()


def test_all_servers_down_fails_until_one_is_back():
    server = serve(Lengths(), grace_s=0.01)
    scorer = GrpcScorer(grpc_entry(server, batch=1), SETUP, first_rest_s=0.05)
    requests = [request("abc", number=n) for n in range(8)]
    try:
        assert scores(scorer, requests) == [3.0] * 8
        server.stop()
        began = time.monotonic()
        for _ in range(2):
            assert all(
                isinstance(o, Failed) and o.transient for row in scorer.score(requests) for o in row
            )
        assert time.monotonic() - began < 5.0
        server = serve(Lengths(), port=port_of(server))
        while not all(isinstance(o, Scored) for row in scorer.score(requests) for o in row):
            assert time.monotonic() - began < 20.0
            time.sleep(0.05)
    finally:
        scorer.close()
        server.stop()


def test_slow_service_fails_at_its_deadline():
    server = serve(Lengths(wait_s=1.0), grace_s=0.01)
    scorer = GrpcScorer(grpc_entry(server, timeout_s=0.1), SETUP)
    try:
        began = time.monotonic()
        [[outcome]] = scorer.score([request("a")])
        assert (
            isinstance(outcome, Failed)
            and outcome.transient
            and "no response within 0.1 s" in outcome.reason
        )
        assert time.monotonic() - began < 1.5
    finally:
        scorer.close()
        server.stop()


def test_calls_of_disconnected_clients_do_not_reach_the_scorer():
    class Held(Lengths):
        free = threading.Event()

        def score(self, requests):
            answers = super().score(requests)
            assert self.free.wait(30)
            return answers

    engine = Held()
    server = serve(engine)
    client = Client(server.address, EndpointSecurity(), base=HERE)
    message = pb.ScoreRequests(requests=[encode_request(request("a"))])

    def ask(timeout_s):
        return client.call(ScorerStub(client.channel).Score, message, timeout_s=timeout_s)

    try:
        first = threading.Thread(target=ask, args=(30,))
        first.start()
        assert engine.called.wait(10)
        for _ in range(3):
            with pytest.raises(UnreachableError, match=r"no response within 0\.1 s"):
                ask(0.1)
        left = ScorerStub(client.channel).Score.future(message, timeout=30)
        time.sleep(0.2)  # it waits in the server
        left.cancel()
        time.sleep(0.2)
        engine.free.set()
        first.join()
        ask(30)
        assert engine.calls == 2
    finally:
        client.close()
        server.stop()


def test_circuit_opens_is_probed_and_closes():
    server = serve(Lengths())
    client = Client(server.address, EndpointSecurity(), base=HERE)
    now = 0.0
    calls = 0
    up = False
    endpoints = Endpoints(
        [client], service=SERVICE, in_flight=1, first_rest_s=1.0, clock=lambda: now
    )

    def call(_):
        nonlocal calls
        calls += 1
        if not up:
            raise UnreachableError("unreachable")
        return "answer"

    def fails(times, message="unreachable"):
        """Return how many of the calls reached the endpoint."""
        before = calls
        for _ in range(times):
            with pytest.raises(UnreachableError, match=message):
                endpoints.call(call, set())
        return calls - before

    try:
        assert fails(OPENS_AFTER + 5) == OPENS_AFTER  # open: the others were not even tried
        now = 1.0
        assert fails(4) == 1  # half open: its health was good, one call went through and failed
        now = 2.9
        assert fails(1) == 0  # it rests twice as long now
        now, up = 3.0, True
        assert [endpoints.call(call, set()) for _ in range(3)] == ["answer"] * 3
        server.stop()
        up = False
        assert fails(OPENS_AFTER) == OPENS_AFTER
        now = 4.0
        assert fails(1, "unavailable") == 0  # its health cannot be probed: no call goes there
    finally:
        endpoints.close()


def test_least_busy_endpoint_is_called_within_its_limit():
    clients = [Client(f"127.0.0.1:{port}", EndpointSecurity(), base=HERE) for port in (1, 2)]
    for in_flight, callers in (
        (2, 12),
        (4, 4),
    ):  # as many as may; half of them where all find a place
        endpoints = Endpoints(clients, service=SERVICE, in_flight=in_flight)
        lock, together, busy, most = (
            threading.Lock(),
            threading.Barrier(4),
            dict.fromkeys(clients, 0),
            set(),
        )

        def call(client, lock=lock, together=together, busy=busy, most=most):
            with lock:
                busy[client] += 1
            together.wait(30)
            with lock:
                most.update(busy.values())
            together.wait(30)
            with lock:
                busy[client] -= 1

        threads = [
            threading.Thread(target=endpoints.call, args=(call, set())) for _ in range(callers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == {2}
    endpoints.close()


def test_call_that_failed_at_one_endpoint_is_retried_at_another():
    clients = [Client(f"127.0.0.1:{port}", EndpointSecurity(), base=HERE) for port in (1, 2)]
    endpoints = Endpoints(clients, service=SERVICE, in_flight=2)
    called = []

    def call(client):
        called.append(client)
        raise UnreachableError("unreachable")

    tried = set()
    for _ in range(2):
        with pytest.raises(UnreachableError):
            endpoints.call(call, tried)
    endpoints.close()
    assert called == clients and tried == set(clients)


def test_one_caller_probes_the_health_for_all():
    class Slow(Client):
        probes = 0

        def check_health(self, service, *, timeout_s):
            self.probes += 1
            time.sleep(0.2)

    client = Slow("127.0.0.1:1", EndpointSecurity(), base=HERE)
    endpoints = Endpoints([client], service=SERVICE, in_flight=9, first_rest_s=0.01)
    answers, up = [], threading.Event()

    def call(_):
        if not up.is_set():
            raise UnreachableError("unreachable")
        return "answer"

    for _ in range(OPENS_AFTER):
        with pytest.raises(UnreachableError):
            endpoints.call(call, set())
    time.sleep(0.02)
    up.set()
    threads = [
        threading.Thread(target=lambda: answers.append(endpoints.call(call, set())))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    endpoints.close()
    assert answers == ["answer"] * 5 and client.probes == 1


def test_server_that_is_stopping_is_not_healthy():
    server = serve(Lengths())
    client = Client(server.address, EndpointSecurity(), base=HERE)
    try:
        client.check_health(SERVICE, timeout_s=5)
        server._health.enter_graceful_shutdown()  # what stop() does first
        with pytest.raises(UnreachableError, match=f"{SERVICE} is not serving"):
            client.check_health(SERVICE, timeout_s=5)
    finally:
        client.close()
        server.stop()

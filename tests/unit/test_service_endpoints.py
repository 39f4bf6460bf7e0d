"""Services that die, hang and come back: everything is scored by who is left, or Failed, and nobody is asked in vain."""

from __future__ import annotations

import threading
import time

import pytest
from serving import HERE, Lengths, port_of, remote, request, scores, serve

from rayhf.config.service import EndpointSecurity
from rayhf.errors import UnreachableError
from rayhf.experience import Failed, Scored
from rayhf.scorer.endpoints import OPENS_AFTER, Endpoints
from rayhf.scorer.remote import Remote
from rayhf.service.client import Client
from rayhf.service.proto import scorer_pb2 as pb
from rayhf.service.proto.scorer_pb2_grpc import ScorerStub
from rayhf.service.scorer_messages import SERVICE, encode_request


def test_when_one_of_two_dies_on_the_way_everything_is_scored():
    dying, living = Lengths(wait_s=0.01), Lengths(wait_s=0.01)
    first, second = serve(dying, grace_s=0.01), serve(living)
    far = Remote(remote(first, second, batch=1), base=HERE)

    def kill():
        while dying.calls < 3:
            time.sleep(0.001)
        first.stop()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        asked = [request("x" * n, number=n) for n in range(60)]
        assert scores(far, asked) == [float(n) for n in range(60)]
        killer.join()
        assert 3 <= dying.calls < 60 and living.calls >= 60 - dying.calls
    finally:
        far.close()
        second.stop()


def test_when_all_are_down_nothing_is_made_up_and_when_one_is_back_it_is_asked():
    server = serve(Lengths(), grace_s=0.01)
    far = Remote(remote(server, batch=1), base=HERE, first_rest_s=0.05)
    asked = [request("abc", number=n) for n in range(8)]
    try:
        assert scores(far, asked) == [3.0] * 8
        server.stop()
        began = time.monotonic()
        for _ in range(2):
            assert all(isinstance(o, Failed) and o.transient for row in far.score(asked) for o in row)
        assert time.monotonic() - began < 5.0
        server = serve(Lengths(), port=port_of(server))
        while not all(isinstance(o, Scored) for row in far.score(asked) for o in row):
            assert time.monotonic() - began < 20.0
            time.sleep(0.05)
    finally:
        far.close()
        server.stop()


def test_a_slow_service_costs_its_deadline_and_no_more():
    server = serve(Lengths(wait_s=1.0), grace_s=0.01)
    far = Remote(remote(server, timeout_s=0.1), base=HERE)
    try:
        began = time.monotonic()
        [[outcome]] = far.score([request("a")])
        assert isinstance(outcome, Failed) and outcome.transient and "no answer within 0.1 s" in outcome.reason
        assert time.monotonic() - began < 1.5
    finally:
        far.close()
        server.stop()


def test_calls_whose_client_has_gone_do_not_reach_the_scorer():
    engine = Lengths(wait_s=0.4)
    server = serve(engine)
    client = Client(server.address, EndpointSecurity(), base=HERE)
    try:

        def ask(timeout_s):
            with pytest.raises(UnreachableError):
                asked = pb.ScoreRequests(requests=[encode_request(request("a"))])
                client.call(ScorerStub(client.channel).Score, asked, timeout_s=timeout_s)

        calls = [threading.Thread(target=ask, args=(0.15,)) for _ in range(4)]
        for call in calls:
            call.start()
        for call in calls:
            call.join()
        time.sleep(0.5)
        assert engine.calls == 1
    finally:
        client.close()
        server.stop()


def test_the_circuit_opens_is_probed_by_health_and_closes():
    server = serve(Lengths())
    client = Client(server.address, EndpointSecurity(), base=HERE)
    endpoints = Endpoints([client], service=SERVICE, in_flight=1, first_rest_s=0.1)
    asked, up = [], False

    def call(_):
        asked.append(time.monotonic())
        if not up:
            raise UnreachableError("away")
        return "answer"

    def fails(times, message="away"):
        for _ in range(times):
            with pytest.raises(UnreachableError, match=message):
                endpoints.ask(call, set())

    try:
        fails(OPENS_AFTER + 5)
        assert len(asked) == OPENS_AFTER  # open: the others were not even tried
        time.sleep(0.12)
        fails(4)
        assert len(asked) == OPENS_AFTER + 1  # half open: its health was good, one call went through and failed
        time.sleep(0.12)
        fails(1)
        assert len(asked) == OPENS_AFTER + 1  # it rests twice as long now
        up = True
        time.sleep(0.1)
        assert [endpoints.ask(call, set()) for _ in range(3)] == ["answer"] * 3
        server.stop()
        up = False
        fails(OPENS_AFTER)
        time.sleep(0.12)
        seen = len(asked)
        fails(1, "unavailable")
        assert len(asked) == seen  # its health cannot be asked: no call goes there
    finally:
        endpoints.close()


def test_the_least_busy_endpoint_is_asked_and_no_more_at_a_time_than_allowed():
    clients = [Client(f"127.0.0.1:{port}", EndpointSecurity(), base=HERE) for port in (1, 2)]
    endpoints = Endpoints(clients, service=SERVICE, in_flight=2)
    lock, busy, most, total = threading.Lock(), dict.fromkeys(clients, 0), dict.fromkeys(clients, 0), dict.fromkeys(clients, 0)

    def call(client):
        with lock:
            busy[client] += 1
            total[client] += 1
            most[client] = max(most[client], busy[client])
        time.sleep(0.02)
        with lock:
            busy[client] -= 1

    threads = [threading.Thread(target=endpoints.ask, args=(call, set())) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    endpoints.close()
    assert set(most.values()) == {2} and set(total.values()) == {6}

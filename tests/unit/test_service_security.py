"""Access to services: certificates, tokens, limits, and configs that are refused."""

from __future__ import annotations

import datetime
import logging
import threading

import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import ValidationError
from serving import HERE, Lengths, port_of, request, serve

from rayhf.config.service import EndpointSecurity, ServiceConfig, TLSConfig, split_endpoint
from rayhf.errors import ConfigError, ServiceError, UnreachableError
from rayhf.scorer.grpc import scorer_pb2 as pb
from rayhf.scorer.grpc.messages import SERVICE, encode_request
from rayhf.scorer.grpc.scorer_pb2_grpc import ScorerStub
from rayhf.service.client import Client
from rayhf.service.credentials import read_token

TOKEN = "a-canary-of-a-token-0123456789"
PAST = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)


def private(path, content):
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def identity(folder, ca, name, **dates):
    """Return (certificate, key) from a CA."""
    issued = ca.issue_cert("127.0.0.1", **dates)
    issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    return folder / f"{name}.pem", private(folder / f"{name}.key", issued.private_key_pem.bytes())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Files by name: the CA, the server's and several clients' identities, tokens."""
    folder = tmp_path_factory.mktemp("identities")
    ours = trustme.CA()
    theirs = trustme.CA()
    ours.cert_pem.write_to_path(folder / "ca.pem")
    theirs.cert_pem.write_to_path(folder / "other_ca.pem")
    for name, ca, dates in (
        ("server", ours, {}),
        ("client", ours, {}),
        ("stranger", theirs, {}),
        ("expired", ours, {"not_before": PAST, "not_after": PAST + datetime.timedelta(days=9)}),
    ):
        identity(folder, ca, name, **dates)
    private(folder / "token", TOKEN.encode() + b"\n")
    private(folder / "wrong_token", b"not-the-token-0123456789")
    return folder


def tls(name, client_ca="ca.pem"):
    return TLSConfig(certificate=f"{name}.pem", key=f"{name}.key", client_ca=client_ca)


@pytest.fixture(scope="module")
def locked(world):
    """A server with mutual TLS and a token, and its engine."""
    engine = Lengths()
    server = serve(engine, base=world, tls=tls("server"), token_file="token")
    yield server, engine
    server.stop()


GOOD = {"ca": "ca.pem", "certificate": "client.pem", "key": "client.key", "token_file": "token"}


def without(*names):
    return {name: value for name, value in GOOD.items() if name not in names}


def as_(name):
    return GOOD | {"certificate": f"{name}.pem", "key": f"{name}.key"}


def score(address, base, security, text="four", *, limit=16, timeout_s=5.0):
    client = Client(address, EndpointSecurity(**security), base=base, max_message_mib=limit)
    try:
        requests = pb.ScoreRequests(requests=[encode_request(request(text))])
        reply = client.call(ScorerStub(client.channel).Score, requests, timeout_s=timeout_s)
        return reply.results[0].outcomes[0].scored.value
    finally:
        client.close()


def test_client_with_all_credentials_is_served(world, locked):
    assert score(locked[0].address, world, GOOD) == 4.0


@pytest.mark.parametrize(
    ("security", "message"),
    [
        pytest.param(without("certificate", "key"), "unavailable", id="no client certificate"),
        pytest.param(as_("stranger"), "unavailable", id="certificate from another CA"),
        pytest.param(as_("expired"), "unavailable", id="expired client certificate"),
        pytest.param(
            GOOD | {"ca": "other_ca.pem"}, "CERTIFICATE_VERIFY_FAILED", id="server from another CA"
        ),
        pytest.param(
            without("token_file"), "unauthenticated: the token is missing or wrong", id="no token"
        ),
        pytest.param(GOOD | {"token_file": "wrong_token"}, "unauthenticated", id="wrong token"),
        pytest.param({}, "unavailable", id="plain text to a TLS port"),
        pytest.param({"token_file": "token"}, "unavailable", id="plain text with the token"),
    ],
)
def test_other_clients_are_refused_and_never_reach_the_scorer(
    world, locked, caplog, security, message
):
    server, engine = locked
    before = engine.calls
    with caplog.at_level(logging.DEBUG), pytest.raises(ServiceError, match=message) as error:
        score(server.address, world, security)
    assert engine.calls == before
    assert (
        TOKEN not in f"{error.value!r} {error.value.__cause__!r} {caplog.text}"
        and "\n" not in str(error.value)
    )


def test_expired_server_is_refused(world):
    server = serve(Lengths(), base=world, tls=tls("expired", client_ca=None))
    try:
        with pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
            score(server.address, world, {"ca": "ca.pem"})
    finally:
        server.stop()


def test_token_on_loopback_and_health_without_one(world):
    server = serve(Lengths(), base=world, token_file="token")
    client = Client(server.address, EndpointSecurity(), base=world)
    try:
        assert score(server.address, world, {"token_file": "token"}) == 4.0
        with pytest.raises(ServiceError, match="unauthenticated"):
            score(server.address, world, {})
        client.check_health(SERVICE, timeout_s=5)
        watch = health_pb2_grpc.HealthStub(client.channel).Watch  # a stream would occupy a thread
        with pytest.raises(ServiceError, match="unauthenticated"):
            list(client.stream(watch, health_pb2.HealthCheckRequest(service=SERVICE), timeout_s=5))
    finally:
        client.close()
        server.stop()


def test_messages_over_the_limit_are_refused_at_both_ends():
    engine = Lengths()
    server = serve(engine)
    try:
        large = "x" * (17 << 20)
        for limit, who in ((16, "CLIENT"), (32, "SERVER")):
            with pytest.raises(
                ServiceError, match=f"resource_exhausted: {who}: .*larger than max"
            ) as error:
                score(server.address, HERE, {}, large, limit=limit)
            assert not isinstance(error.value, UnreachableError)  # a retry would not help
        assert engine.calls == 0
    finally:
        server.stop()


def test_calls_over_the_limit_are_refused_at_once():
    engine = Lengths(wait_s=0.5)
    server = serve(engine, max_concurrent=1)
    try:
        first = threading.Thread(target=score, args=(server.address, HERE, {}))
        first.start()
        assert engine.called.wait(5)
        with pytest.raises(UnreachableError, match="resource_exhausted"):
            score(server.address, HERE, {}, timeout_s=0.4)
        first.join()
        assert engine.calls == 1
    finally:
        server.stop()


def test_port_in_use_is_refused():
    server = serve(Lengths())
    try:
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port_of(server)};"):
            serve(Lengths(), port=port_of(server))
    finally:
        server.stop()


def test_stop_waits_for_calls_in_progress_and_refuses_new_ones():
    engine = Lengths(wait_s=0.3)
    scores = []
    server = serve(engine)
    call = threading.Thread(target=lambda: scores.append(score(server.address, HERE, {})))
    call.start()
    assert engine.called.wait(5)
    server.stop()
    call.join()
    assert scores == [4.0]
    with pytest.raises(UnreachableError):
        score(server.address, HERE, {}, timeout_s=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"host": "0.0.0.0"},
            "host 0.0.0.0 is reachable from other machines: set tls, or host: 127.0.0.1",
        ),
        ({"host": "::"}, "reachable from other machines: set tls"),
        ({"host": "gpu-7"}, "reachable from other machines: set tls"),
        ({"host": "0.0.0.0", "token_file": "t"}, "reachable from other machines: set tls"),
        (
            {"host": "0.0.0.0", "tls": {"certificate": "c", "key": "k"}},
            "set tls.client_ca or token_file",
        ),
        ({"port": 65536}, "less than or equal to 65535"),
    ],
)
def test_open_server_configs_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        ServiceConfig(**settings)


@pytest.mark.parametrize(
    ("endpoint", "security", "message"),
    [
        ("gpu-7:50051", {}, "is on another machine: set security.ca"),
        ("10.0.0.7:50051", {"token_file": "t"}, "is on another machine: set security.ca"),
        ("localhost", {}, "is not of the form host:port"),
        ("http://localhost:1", {}, "is not of the form host:port"),
        ("localhost:0", {}, "is not of the form host:port"),
        ("::1:50051", {}, r"did you mean \[::1\]:50051"),
    ],
)
def test_unencrypted_or_malformed_endpoints_are_refused(endpoint, security, message):
    with pytest.raises(ValueError, match=message):
        split_endpoint(endpoint, EndpointSecurity(**security))
    with pytest.raises(ConfigError, match=message):
        Client(endpoint, EndpointSecurity(**security), base=HERE)


def test_certificate_needs_key_and_tls():
    with pytest.raises(ValidationError, match="belong together"):
        EndpointSecurity(ca="ca.pem", certificate="c.pem")
    with pytest.raises(ValidationError, match="a client certificate needs TLS"):
        EndpointSecurity(certificate="c.pem", key="c.key")


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        (TOKEN, 0o640, "has mode 0640, others may read it; expected 0600"),
        (TOKEN, 0o604, "has mode 0604"),
        ("short", 0o600, "has 5 characters, expected at least 16"),
        ("two words are no token", 0o600, "white space or a character outside ASCII"),
        ("tökentökentökentöken", 0o600, "white space or a character outside ASCII"),
    ],
)
def test_exposed_or_malformed_tokens_are_refused(tmp_path, content, mode, message):
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"^service.token_file: .*{message}") as error:
        serve(Lengths(), base=tmp_path, token_file="token")
    assert content not in str(error.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_token(tmp_path / "absent", key="k")


def test_exposed_private_key_is_refused(world):
    (world / "open.key").write_bytes((world / "server.key").read_bytes())
    (world / "open.key").chmod(0o644)
    with pytest.raises(ConfigError, match=r"service\.tls\.key: .*mode 0644"):
        serve(Lengths(), base=world, tls=TLSConfig(certificate="server.pem", key="open.key"))

"""A gRPC client: one connection with its credentials; translates gRPC's errors to rayhf's.

In: "host:port" and an EndpointSecurity. Out: replies, or an error of rayhf.errors. Every call has a
deadline and is sent once; callers decide about retries. Calls may come from many threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rayhf.config.service import EndpointSecurity, split_endpoint
from rayhf.errors import ConfigError, RayhfError, ServiceError, UnreachableError
from rayhf.service.credentials import read_private, read_public, read_token

Reply = TypeVar("Reply")

MAX_DETAILS = 400
"""Characters of a server's error message that are passed on."""
_RETRYABLE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
)


class Client:
    """A connection to one endpoint, made at the first call and again after it was lost.

        client = Client("127.0.0.1:50051", security, base=Path.cwd())
        reply = client.call(ScorerStub(client.channel).Describe, DescribeRequest(), timeout_s=5)

    Raises ConfigError for an endpoint or files that cannot be used.
    """

    def __init__(
        self, endpoint: str, security: EndpointSecurity, *, base: Path, max_message_mib: int = 16
    ) -> None:
        try:
            split_endpoint(endpoint, security)
        except ValueError as error:
            raise ConfigError(f"endpoint {error}") from None
        self.endpoint = endpoint
        self._metadata: tuple[tuple[str, str], ...] = ()
        if security.token_file is not None:
            token = read_token(base / security.token_file, key="security.token_file")
            self._metadata = (("authorization", f"Bearer {token}"),)
        options = _options(max_message_mib)
        if security.ca is None:
            self.channel = grpc.insecure_channel(endpoint, options)
        else:
            self.channel = grpc.secure_channel(endpoint, _credentials(security, base), options)
        self._health = health_pb2_grpc.HealthStub(self.channel)

    def call(self, method: Callable[..., Reply], request: object, *, timeout_s: float) -> Reply:
        """Send one request and return the reply.

        Raises UnreachableError where a retry may help, ServiceError where it will not, and
        ConfigError where the server refused the request's content.
        """
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._translated(error, timeout_s) from None

    def stream(
        self, method: Callable[..., Iterator[Reply]], request: object, *, timeout_s: float
    ) -> Iterator[Reply]:
        """Send one request and yield replies as they arrive, for at most timeout_s.

        Raises as `call`.
        """
        try:
            yield from method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._translated(error, timeout_s) from None

    def check_health(self, service: str, *, timeout_s: float) -> None:
        """Raise UnreachableError unless the server reports that the service is serving."""
        request = health_pb2.HealthCheckRequest(service=service)
        reply = self.call(self._health.Check, request, timeout_s=timeout_s)
        if reply.status != health_pb2.HealthCheckResponse.SERVING:
            raise UnreachableError(f"{self.endpoint}: {service} is not serving")

    def close(self) -> None:
        """Close the connection."""
        self.channel.close()

    def _translated(self, error: grpc.RpcError, timeout_s: float) -> RayhfError:
        # What a call raises is also its outcome (grpc.Call), which has the code and the details.
        assert isinstance(error, grpc.Call)
        code = error.code()
        details = printable(error.details() or "")
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return UnreachableError(f"{self.endpoint}: no response within {timeout_s:g} s")
        line = f"{self.endpoint}: {code.name.lower()}: {details}"
        # A server without a free thread and a message over the limit share one code.
        is_busy = code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" not in details
        if code in _RETRYABLE or is_busy:
            return UnreachableError(line)
        return ConfigError(line) if code == grpc.StatusCode.INVALID_ARGUMENT else ServiceError(line)


def _options(max_message_mib: int) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", max_message_mib << 20),
        ("grpc.max_send_message_length", max_message_mib << 20),
        ("grpc.enable_retries", 0),  # callers decide about retries
        ("grpc.enable_http_proxy", 0),  # a proxy could read plain text meant for loopback
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 200),
        # By default a service that is back may be noticed two minutes late.
        ("grpc.max_reconnect_backoff_ms", 2000),
    )


def _credentials(security: EndpointSecurity, base: Path) -> grpc.ChannelCredentials:
    assert security.ca is not None
    ca = read_public(base / security.ca, key="security.ca")
    if security.certificate is None or security.key is None:
        return grpc.ssl_channel_credentials(ca)
    certificate = read_public(base / security.certificate, key="security.certificate")
    key = read_private(base / security.key, key="security.key")
    return grpc.ssl_channel_credentials(ca, key, certificate)


def printable(text: str) -> str:
    """Return `text` as one line that is safe on any terminal: it may come from another server."""
    line = " ".join(text[:MAX_DETAILS].split())
    return "".join(character if character.isprintable() else "?" for character in line)

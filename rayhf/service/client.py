"""The client's end of a service: one connection, its identity, and the one place where grpc's
errors become ours.

In: "host:port" and an EndpointSecurity. Out: answers, or an error of rayhf.errors. Every call has a
deadline; nothing is repeated here. Calls may come from many threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rayhf.config.service import EndpointSecurity, split_endpoint
from rayhf.errors import ConfigError, RayhfError, ServiceError, UnreachableError
from rayhf.service.credentials import read_private, read_public, read_token

MAX_DETAILS = 400
"""Characters of a server's own words that are passed on."""
_AWAY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
)


class Client:
    """A connection to one endpoint; it is made at the first call, and again when it was lost.

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
        token = (
            None
            if security.token_file is None
            else read_token(base / security.token_file, key="security.token_file")
        )
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        options = _options(max_message_mib)
        if security.ca is None:
            self.channel = grpc.insecure_channel(endpoint, options)
        else:
            self.channel = grpc.secure_channel(endpoint, _credentials(security, base), options)
        self._health = health_pb2_grpc.HealthStub(self.channel)

    def call(self, method: Callable[..., Any], request: Any, *, timeout_s: float) -> Any:
        """One answer. Raises UnreachableError where asking again may help, ServiceError where it
        will not, and ConfigError where the request was refused for what it says."""
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._translated(error, timeout_s) from None

    def stream(
        self, method: Callable[..., Any], request: Any, *, timeout_s: float
    ) -> Iterator[Any]:
        """Answers as they come, for at most timeout_s. Raises as call()."""
        try:
            yield from method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._translated(error, timeout_s) from None

    def check_health(self, service: str, *, timeout_s: float) -> None:
        """Raises UnreachableError unless the server says that the service is serving."""
        reply = self.call(
            self._health.Check, health_pb2.HealthCheckRequest(service=service), timeout_s=timeout_s
        )
        if reply.status != health_pb2.HealthCheckResponse.SERVING:
            raise UnreachableError(f"{self.endpoint}: {service} is not serving")

    def close(self) -> None:
        self.channel.close()

    def _translated(self, error: Any, timeout_s: float) -> RayhfError:
        code, details = error.code(), printable(error.details() or "")
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return UnreachableError(f"{self.endpoint}: no answer within {timeout_s:g} s")
        line = f"{self.endpoint}: {code.name.lower()}: {details}"
        if code in _AWAY or (
            code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" not in details
        ):
            return UnreachableError(line)
        return ConfigError(line) if code == grpc.StatusCode.INVALID_ARGUMENT else ServiceError(line)


def _options(max_message_mib: int) -> tuple[tuple[str, Any], ...]:
    return (
        ("grpc.max_receive_message_length", max_message_mib << 20),
        ("grpc.max_send_message_length", max_message_mib << 20),
        ("grpc.enable_retries", 0),  # who asks again, and how often, is decided by the caller
        ("grpc.enable_http_proxy", 0),  # a proxy would read what is in the clear on loopback
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 200),
        (
            "grpc.max_reconnect_backoff_ms",
            2000,
        ),  # by default a service that is back may be noticed two minutes late
    )


def _credentials(security: EndpointSecurity, base: Path) -> grpc.ChannelCredentials:
    assert security.ca is not None
    ca = read_public(base / security.ca, key="security.ca")
    if security.certificate is None or security.key is None:
        return grpc.ssl_channel_credentials(ca)
    certificate = read_public(base / security.certificate, key="security.certificate")
    return grpc.ssl_channel_credentials(
        ca, read_private(base / security.key, key="security.key"), certificate
    )


def printable(text: str) -> str:
    """One line that can be shown on any terminal: a server's words are not ours."""
    line = " ".join(text[:MAX_DETAILS].split())
    return "".join(character if character.isprintable() else "?" for character in line)

"""A gRPC server: loopback or TLS, a token, limits, health checks, graceful shutdown.

In: a ServiceConfig and functions that register services. Out: a running Server with its address.
Calls run on the server's own threads; the caller stops the server. Health.Check is answered without
a token, since it only says that a service is serving; the client certificate is required there too.
Reflection is off: no call lists the services.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from rayhf.config.service import ServiceConfig, TLSConfig
from rayhf.errors import ConfigError, LockedError, QuotaError, RayhfError
from rayhf.service.admission import HEALTH_CHECK, Admission
from rayhf.service.credentials import read_private, read_public, read_token

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 10.0
MAX_CALLS_PER_CONNECTION = 128
"""Further ones wait at the client."""
Register = Callable[[grpc.Server], None]
"""Adds one service, for example `partial(add_ScorerServicer_to_server, servicer)`."""
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in the type stubs only


class Server:
    """A server that binds its port when created and serves from `start` on.

    Args:
        config: address, credentials and limits.
        services: by full name ("rayhf.v1.Scorer"); health checks cover each, and all under "".
        base: start of relative paths.
        urgent: full names of further methods that, like Health.Check, are served in any case: other
            calls and open streams leave them room.

    Raises ConfigError for files that cannot be used and for a port in use.
    """

    def __init__(
        self,
        config: ServiceConfig,
        services: dict[str, Register],
        *,
        base: Path,
        urgent: Sequence[str] = (),
    ) -> None:
        interceptors: list[grpc.ServerInterceptor] = []
        if config.token_file is not None:
            token = read_token(base / config.token_file, key="service.token_file")
            interceptors.append(_TokenCheck(token))
        admission = Admission(config.max_concurrent, urgent=(HEALTH_CHECK, *urgent))
        interceptors.append(admission)
        self._grace_s = config.grace_s
        self._server = grpc.server(
            ThreadPoolExecutor(admission.threads, thread_name_prefix="rpc"),
            interceptors=interceptors,
            options=_options(config.max_message_mib),
            maximum_concurrent_rpcs=admission.threads,
        )
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names = ("", *services)
        for register in services.values():
            register(self._server)
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.address = f"{host}:{self._bind(config, host, base)}"
        """host:port for a client on this machine."""

    def start(self) -> None:
        """Start serving."""
        for name in self._names:
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._server.start()

    def stop(self) -> None:
        """Refuse new calls, wait up to grace_s for those in progress, cancel the rest, return."""
        self._health.enter_graceful_shutdown()
        self._server.stop(self._grace_s).wait()

    def _bind(self, config: ServiceConfig, host: str, base: Path) -> int:
        """Bind the port and return its number."""
        target = f"{host}:{config.port}"
        try:
            if config.tls is None:
                return self._server.add_insecure_port(target)
            return self._server.add_secure_port(target, _credentials(config.tls, base))
        except RuntimeError:
            raise ConfigError(
                f"service: cannot listen on {target}; is the port in use, the host that of another "
                "machine, or a PEM file broken?"
            ) from None


def _options(max_message_mib: int) -> Sequence[tuple[str, int]]:
    return (
        ("grpc.so_reuseport", 0),  # a second server on the same port is refused, not mixed in
        ("grpc.max_receive_message_length", max_message_mib << 20),
        ("grpc.max_send_message_length", max_message_mib << 20),
        ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_TIMEOUT_S * 1000)),
    )


def _credentials(tls: TLSConfig, base: Path) -> grpc.ServerCredentials:
    key = read_private(base / tls.key, key="service.tls.key")
    certificate = read_public(base / tls.certificate, key="service.tls.certificate")
    ca = None
    if tls.client_ca is not None:
        ca = read_public(base / tls.client_ca, key="service.tls.client_ca")
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=ca, require_client_auth=ca is not None
    )


class _TokenCheck(grpc.ServerInterceptor):
    """An interceptor that refuses every call without the token, comparing in constant time."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()
        # A handler of a request stream: one of a single request would first wait for it.
        self._refusal: Handler = grpc.stream_unary_rpc_method_handler(_refuse)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the called method's handler, or one that refuses the call."""
        if handler_call_details.method == HEALTH_CHECK:
            return continuation(handler_call_details)
        sent = dict(handler_call_details.invocation_metadata).get("authorization", "")
        if hmac.compare_digest(str(sent).encode(), self._expected):
            return continuation(handler_call_details)
        return self._refusal


def _refuse(_requests: object, context: grpc.ServicerContext) -> NoReturn:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")


@contextmanager
def error_statuses(context: grpc.ServicerContext) -> Iterator[None]:
    """Turn an error of rayhf in a servicer's method into a gRPC status with its message.

    Other errors are bugs: gRPC logs them here, and the client gets UNKNOWN.
    """
    try:
        yield
    except QuotaError as error:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
    except ConfigError as error:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except LockedError as error:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except RayhfError as error:
        logger.error("call failed: %s", error)
        context.abort(grpc.StatusCode.INTERNAL, str(error))

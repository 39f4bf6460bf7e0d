"""A gRPC server as every service of rayhf has it: loopback or TLS, a token, limits, health, a
graceful end.

In: a ServiceConfig and what registers the services on it. Out: a running Server with the address it
got. Calls come in on its own threads; whoever started it calls stop(). Health is answered without a
token (Check only, which tells nothing but that it serves); a client certificate is asked for there
too. Nothing here lists what is served (no reflection).
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from rayhf.config.service import ServiceConfig, TLSConfig
from rayhf.errors import ConfigError, LockedError, RayhfError
from rayhf.service.credentials import read_private, read_public, read_token

logger = logging.getLogger(__name__)

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
HANDSHAKE_TIMEOUT_S = 10.0
Register = Callable[[grpc.Server], None]
"""Adds one service, for example `partial(add_ScorerServicer_to_server, servicer)`."""


class Server:
    """Listens from the start, serves nothing before `start`.

    Args:
        config: where, and for whom.
        services: by full name ("rayhf.v1.Scorer"); health answers for each and for "".
        base: relative paths start here.

    Raises ConfigError for files that cannot be used and a port that is taken.
    """

    def __init__(self, config: ServiceConfig, services: dict[str, Register], *, base: Path) -> None:
        token = (
            None
            if config.token_file is None
            else read_token(base / config.token_file, key="service.token_file")
        )
        self._grace_s = config.grace_s
        self._server = grpc.server(
            ThreadPoolExecutor(config.max_concurrent, thread_name_prefix="rpc"),
            interceptors=[] if token is None else [_Bearer(token)],
            options=_options(config.max_message_mib),
            maximum_concurrent_rpcs=config.max_concurrent,
        )
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names = ("", *services)
        for register in services.values():
            register(self._server)
        port = self._bind(config, base)
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.address = f"{host}:{port}"
        """host:port, as a client on this machine writes it."""

    def start(self) -> None:
        for name in self._names:
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._server.start()

    def stop(self) -> None:
        """Take no new calls, let those under way end within grace_s, cancel the rest; returns when
        all is over."""
        self._health.enter_graceful_shutdown()
        self._server.stop(self._grace_s).wait()

    def _bind(self, config: ServiceConfig, base: Path) -> int:
        host = f"[{config.host}]" if ":" in config.host else config.host
        target = f"{host}:{config.port}"
        try:
            if config.tls is None:
                return self._server.add_insecure_port(target)
            return self._server.add_secure_port(target, _credentials(config.tls, base))
        except RuntimeError:
            raise ConfigError(
                f"service: {target} cannot be listened on; is the port taken, the host another machine's, or a PEM file broken?"
            ) from None


def _options(max_message_mib: int) -> Sequence[tuple[str, Any]]:
    return (
        ("grpc.so_reuseport", 0),  # a second server on the same port is refused, not mixed in
        ("grpc.max_receive_message_length", max_message_mib << 20),
        ("grpc.max_send_message_length", max_message_mib << 20),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_TIMEOUT_S * 1000)),
    )


def _credentials(tls: TLSConfig, base: Path) -> grpc.ServerCredentials:
    key = read_private(base / tls.key, key="service.tls.key")
    certificate = read_public(base / tls.certificate, key="service.tls.certificate")
    ca = (
        None
        if tls.client_ca is None
        else read_public(base / tls.client_ca, key="service.tls.client_ca")
    )
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=ca, require_client_auth=ca is not None
    )


class _Bearer(grpc.ServerInterceptor):
    """Ends every call that does not show the token, in a time that says nothing about it."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()
        self._refusal: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(
            _refuse
        )

    def intercept_service(
        self,
        continuation: Callable[[Any], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: Any,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if handler_call_details.method == HEALTH_CHECK:
            return continuation(handler_call_details)
        shown = dict(handler_call_details.invocation_metadata).get("authorization", "")
        if hmac.compare_digest(str(shown).encode(), self._expected):
            return continuation(handler_call_details)
        return self._refusal


def _refuse(_request: Any, context: grpc.ServicerContext) -> NoReturn:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "this service wants a token, and this is not it")


@contextmanager
def refusals(context: grpc.ServicerContext) -> Iterator[None]:
    """For the body of a servicer's method: an error of rayhf becomes a status with its line. Others
    are bugs: grpc logs them here and the client hears UNKNOWN."""
    try:
        yield
    except ConfigError as error:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except LockedError as error:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except RayhfError as error:
        logger.error("call failed: %s", error)
        context.abort(grpc.StatusCode.INTERNAL, str(error))

"""Config of gRPC: where a server listens and which clients it accepts; how a client identifies.

Secrets are in files, never in a config. Relative paths start at the working directory of the
command.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rayhf.config.base import Section


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class TLSConfig(Section):
    """PEM files of a server."""

    certificate: Path
    """The server's certificate, followed by the chain to its CA."""
    key: Path
    """Its private key; readable by its owner only (mode 0600)."""
    client_ca: Path | None = None
    """Mutual TLS: CA that every client's certificate must be from."""


class ServiceConfig(Section):
    """Where a gRPC server listens; other machines need TLS and a client certificate or a token."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port to listen on; 0 for any free one, which is printed."""
    tls: TLSConfig | None = None
    """TLS certificates; required for a host that other machines can reach."""
    token_file: Path | None = None
    """File with the token that every call must send, mode 0600 (`openssl rand -hex 32`)."""
    max_message_mib: PositiveInt = 16
    """Maximum size of one message, in either direction."""
    max_concurrent: PositiveInt = 64
    """Maximum number of calls in progress; further ones are refused at once. At most half of them
    may be streams (`rayhf watch`), at most 16 of one client host."""
    grace_s: PositiveFloat = 10.0
    """Seconds that calls in progress may still take when the server stops."""

    @model_validator(mode="after")
    def _check_reach(self) -> ServiceConfig:
        if is_loopback(self.host):
            return self
        if self.tls is None:
            raise ValueError(
                f"host {self.host} is reachable from other machines: set tls, or host: 127.0.0.1"
            )
        if self.tls.client_ca is None and self.token_file is None:
            raise ValueError(
                f"host {self.host} is reachable from other machines: "
                "set tls.client_ca or token_file"
            )
        return self


class EndpointSecurity(Section):
    """How a client checks a server and identifies itself; nothing is needed on one machine."""

    ca: Path | None = None
    """PEM file of the CA that the server's certificate must be from; enables TLS."""
    certificate: Path | None = None
    """PEM file of the client's own certificate, for mutual TLS."""
    key: Path | None = None
    """Its private key, mode 0600."""
    token_file: Path | None = None
    """File with the service's token, mode 0600."""

    @model_validator(mode="after")
    def _check_pairs(self) -> EndpointSecurity:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: set both or neither")
        if self.certificate is not None and self.ca is None:
            raise ValueError("a client certificate needs TLS: set ca")
        return self


NO_SECURITY = EndpointSecurity()


def split_endpoint(endpoint: str, security: EndpointSecurity) -> tuple[str, int]:
    """Return (host, port) of "host:port" or "[address]:port".

    Raises ValueError for anything else, and for another machine without TLS: neither text nor token
    may cross a network unencrypted.
    """
    host, colon, port = endpoint.rpartition(":")
    bare = host.strip("[]")
    is_port = port.isdecimal() and 0 < int(port) < 65536
    if not colon or not bare or not is_port or set(bare) & set("/ \t\n,"):
        raise ValueError(f"{endpoint!r} is not of the form host:port, for example 127.0.0.1:50051")
    if ":" in bare and host != f"[{bare}]":
        raise ValueError(
            f"{endpoint!r} is not of the form host:port; did you mean [{bare}]:{port}?"
        )
    if security.ca is None and not is_loopback(bare):
        raise ValueError(f"{endpoint} is on another machine: set security.ca to use TLS")
    return bare, int(port)

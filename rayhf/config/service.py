"""gRPC: where a service listens and whom it trusts, and what a client shows. Secrets are in files,
never in a config.

A docstring under a field is its help. Relative paths start where the command was given.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rayhf.config.base import Section


def is_loopback(host: str) -> bool:
    """Only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class TLSConfig(Section):
    """PEM files."""

    certificate: Path
    """The server's, with what chains it to its CA."""
    key: Path
    """Its private key; nobody but its owner may read it (mode 0600)."""
    client_ca: Path | None = None
    """Mutual TLS: only clients with a certificate from here are heard."""


class ServiceConfig(Section):
    """Where a gRPC server listens. Beyond this machine only with TLS, and only for clients that say
    who they are."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0 is any free one; it is printed."""
    tls: TLSConfig | None = None
    token_file: Path | None = None
    """A file with the token that every call must show, mode 0600. `openssl rand -hex 32` makes a
    good one."""
    max_message_mib: PositiveInt = 16
    """Of one message, in either direction."""
    max_concurrent: PositiveInt = 64
    """Calls at a time; more are refused at once."""
    grace_s: PositiveFloat = 10.0
    """When it is told to stop, calls under way may take so long, in seconds."""

    @model_validator(mode="after")
    def _check_reach(self) -> ServiceConfig:
        if is_loopback(self.host):
            return self
        if self.tls is None:
            raise ValueError(
                f"host {self.host} is reached from other machines: set tls, or host: 127.0.0.1"
            )
        if self.tls.client_ca is None and self.token_file is None:
            raise ValueError(
                f"host {self.host} is reached from other machines: set tls.client_ca or token_file"
            )
        return self


class EndpointSecurity(Section):
    """How a client checks a server, and what it shows. Nothing at all is for services on this
    machine."""

    ca: Path | None = None
    """PEM file of the CA that the server's certificate must be from; turns TLS on."""
    certificate: Path | None = None
    """PEM file of the client's own certificate, for mutual TLS."""
    key: Path | None = None
    """Its private key, mode 0600."""
    token_file: Path | None = None
    """A file with the service's token, mode 0600."""

    @model_validator(mode="after")
    def _check_pairs(self) -> EndpointSecurity:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: set both or neither")
        if self.certificate is not None and self.ca is None:
            raise ValueError("a certificate is shown over TLS only: set ca")
        return self


NO_SECURITY = EndpointSecurity()


def split_endpoint(endpoint: str, security: EndpointSecurity) -> tuple[str, int]:
    """(host, port) of "host:port" or "[address]:port". Raises ValueError for anything else, and for
    another machine without TLS: neither text nor token crosses a network in the clear."""
    host, colon, port = endpoint.rpartition(":")
    bare = host.strip("[]")
    if (
        not colon
        or not bare
        or not port.isdecimal()
        or not 0 < int(port) < 65536
        or set(bare) & set("/ \t\n,")
    ):
        raise ValueError(f"{endpoint!r} is not of the form host:port, for example 127.0.0.1:50051")
    if ":" in bare and host != f"[{bare}]":
        raise ValueError(
            f"{endpoint!r} is not of the form host:port; did you mean [{bare}]:{port}?"
        )
    if security.ca is None and not is_loopback(bare):
        raise ValueError(
            f"{endpoint} is another machine: set security.ca, so that the connection is TLS"
        )
    return bare, int(port)

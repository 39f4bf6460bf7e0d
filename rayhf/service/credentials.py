"""Tokens, private keys and certificates from files.

Secrets are only read from files that their owner alone can read, and never logged or put into an
error message.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rayhf.errors import ConfigError

MIN_TOKEN = 16
"""Minimum length of a token, in characters."""


def read_token(path: Path, *, key: str) -> str:
    """Return the token in a file.

    Raises ConfigError that names `key` (the config key), as read_private, and for a token that is
    too short or has characters that an HTTP header does not allow.
    """
    token = read_private(path, key=key).decode("ascii", errors="replace").strip()
    if len(token) < MIN_TOKEN:
        raise ConfigError(
            f"{key}: the token in {path} has {len(token)} characters, expected at least {MIN_TOKEN}"
        )
    if not all("!" <= character <= "~" for character in token):
        raise ConfigError(
            f"{key}: the token in {path} contains white space or a character outside ASCII; "
            "expected one word of printable ASCII characters"
        )
    return token


def read_private(path: Path, *, key: str) -> bytes:
    """Return a secret file's content.

    Raises ConfigError unless this user or root owns it, and only the owner can read it.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read()
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error.strerror})") from None
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{key}: {path} belongs to uid {status.st_uid}; expected a file of uid {os.geteuid()} "
            "or of root"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"{key}: {path} has mode {mode:04o}, others may read it; "
            f"expected 0600 (chmod 600 {path})"
        )
    return content


def read_public(path: Path, *, key: str) -> bytes:
    """Return a certificate file's content. Raises ConfigError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error.strerror})") from None

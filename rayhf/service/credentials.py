"""Tokens and private keys, read from files that nobody but their owner may read. What is read is
never logged or raised."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rayhf.errors import ConfigError

MIN_TOKEN = 16
"""Characters."""


def read_token(path: Path, *, key: str) -> str:
    """The one word in the file. Raises ConfigError that names `key`, the config's, as read_private,
    and for a token that is short or cannot travel in a header."""
    token = read_private(path, key=key).decode("ascii", errors="replace").strip()
    if len(token) < MIN_TOKEN:
        raise ConfigError(
            f"{key}: the token in {path} has {len(token)} characters, expected at least {MIN_TOKEN}"
        )
    if not all("!" <= character <= "~" for character in token):
        raise ConfigError(
            f"{key}: {path} holds something other than one word of ASCII characters, which a token is"
        )
    return token


def read_private(path: Path, *, key: str) -> bytes:
    """Raises ConfigError unless the file can be read by its owner alone."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read()
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error.strerror})") from None
    if mode & 0o077:
        raise ConfigError(
            f"{key}: {path} has mode {mode:04o}, others may read it; expected 0600 (chmod 600 {path})"
        )
    return content


def read_public(path: Path, *, key: str) -> bytes:
    """A certificate. Raises ConfigError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error.strerror})") from None

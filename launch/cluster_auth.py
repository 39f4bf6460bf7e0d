"""Check that a Ray cluster requires a token; without one, anyone can run code there.

In: the URL of a job server, or the address of a head. Out: nothing, or SecurityError within
TIMEOUT_S seconds; `rayhf --insecure-cluster` skips all checks. Tokens are no encryption: Ray's
ports belong in a private network in any case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from rayhf.errors import PlacementError, SecurityError

TIMEOUT_S = 10.0
INSECURE = "RAYHF_INSECURE_CLUSTER"
_ADVICE = "start it with RAY_AUTH_MODE=token, or use `rayhf --insecure-cluster ...`"


def set_auth_mode(*, insecure: bool) -> None:
    """Set this process's and its children's mode, before any imports Ray, which reads it then."""
    os.environ[INSECURE] = "1" if insecure else "0"
    if not insecure:
        os.environ["RAY_AUTH_MODE"] = "token"


def insecure() -> bool:
    return os.environ.get(INSECURE) == "1"


def refusal(message: str) -> str:
    """Return the first sentence of Ray's error about a missing or wrong token, and what to do."""
    sentence = message.splitlines()[0].split(". ")[0].rstrip(".")
    return f"{sentence}; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"


def check_token_file() -> None:
    """Raise SecurityError for a token file that others can read, or that another user owns.

    Ray itself writes ~/.ray/auth_token readable by all.
    """
    if insecure() or os.environ.get("RAY_AUTH_TOKEN"):
        return
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        status = file.stat()
    except OSError:
        return  # Ray's own error says what is missing
    if status.st_uid not in (os.geteuid(), 0):
        raise SecurityError(
            f"{file} holds a cluster's token and belongs to uid {status.st_uid}, who may read and "
            f"change it; expected a file of uid {os.geteuid()} or of root"
        )
    if status.st_mode & 0o077:
        raise SecurityError(
            f"{file} holds a cluster's token and has mode {status.st_mode & 0o777:o}: "
            f"chmod 600 {file}"
        )


def check_server(url: str) -> None:
    """Query a job server's authentication mode, without a token.

    Raises SecurityError unless it requires tokens, PlacementError where there is no server.
    """
    if insecure():
        return
    try:
        with urllib.request.urlopen(f"{url}/api/authentication_mode", timeout=TIMEOUT_S) as reply:
            mode = json.loads(reply.read(1 << 16)).get("authentication_mode")
    except urllib.error.HTTPError as error:
        mode = f"unknown (HTTP {error.code})"
    except (OSError, ValueError, AttributeError) as error:
        raise PlacementError(
            f"--address {url}: no Ray job server responds there ({getattr(error, 'reason', error)})"
        ) from None
    if mode != "token":
        raise SecurityError(
            f"the cluster at {url} has no token authentication (its mode: {mode}); {_ADVICE}"
        )


def check_head(address: str) -> None:
    """Send a request to a cluster from a process without its token.

    Raises SecurityError unless the cluster refuses it.
    """
    if insecure():
        return
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    env["RAY_AUTH_MODE"] = "disabled"
    try:
        probe = subprocess.run(
            [sys.executable, "-P", "-m", "actors.ray_internals", address],
            env=env,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        access = probe.stdout.strip() or (probe.stderr.strip().splitlines() or ["no response"])[-1]
    except subprocess.TimeoutExpired:
        access = "no response"
    if access == "open":
        raise SecurityError(f"the cluster at {address} has no token authentication; {_ADVICE}")
    if access != "token":
        raise SecurityError(
            f"cannot tell whether the cluster at {address} requires a token ({access}); {_ADVICE}"
        )

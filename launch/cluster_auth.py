"""Whether a Ray cluster asks everybody for its token: whoever reaches one that does not can run
code there.

In: the URL of a job server, or the address of a head. Out: nothing, or SecurityError within
TIMEOUT_S; `rayhf --insecure-cluster` skips all of it. Tokens are no encryption: Ray's ports belong
into a private network in any case.
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
_WAY_OUT = "start it with RAY_AUTH_MODE=token, or say `rayhf --insecure-cluster ...`"
_PROBE = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)
    print("open")
except AuthenticationError:
    print("token")
"""


def settle(*, insecure: bool) -> None:
    """For this process and its children, before any imports Ray, which reads its mode at import."""
    os.environ[INSECURE] = "1" if insecure else "0"
    if not insecure:
        os.environ["RAY_AUTH_MODE"] = "token"


def refusal(message: str) -> str:
    """What Ray says of a token that is missing or wrong, in its first sentence, and what to do."""
    return f"{message.splitlines()[0].split('. ')[0].rstrip('.')}; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"


def insecure() -> bool:
    return os.environ.get(INSECURE) == "1"


def check_token_file() -> None:
    """Raises SecurityError for a token of ours that others can read. (Ray itself writes
    ~/.ray/auth_token readable by all.)"""
    if insecure() or os.environ.get("RAY_AUTH_TOKEN"):
        return
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        found = file.stat()
    except OSError:
        return  # Ray says what is missing
    if found.st_uid == os.geteuid() and found.st_mode & 0o077:
        raise SecurityError(
            f"{file} holds a cluster's token and has mode {found.st_mode & 0o777:o}: chmod 600 {file}"
        )


def check_server(url: str) -> None:
    """Ask a job server how it treats strangers, as one. Raises PlacementError where there is
    none."""
    if insecure():
        return
    try:
        with urllib.request.urlopen(f"{url}/api/authentication_mode", timeout=TIMEOUT_S) as answer:
            mode = json.loads(answer.read(1 << 16)).get("authentication_mode")
    except urllib.error.HTTPError as error:
        mode = f"unknown (HTTP {error.code})"
    except (OSError, ValueError, AttributeError) as error:
        raise PlacementError(
            f"--address {url}: no Ray job server answers there ({getattr(error, 'reason', error)})"
        ) from None
    if mode != "token":
        raise SecurityError(
            f"the cluster at {url} asks nobody for a token (authentication mode: {mode}); {_WAY_OUT}"
        )


def check_head(address: str) -> None:
    """Try to look around a cluster without its token, from a process that has none."""
    if insecure():
        return
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")
    }
    environment |= {"RAY_AUTH_MODE": "disabled"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, address],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        answer = done.stdout.strip() or (done.stderr.strip().splitlines() or ["no answer"])[-1]
    except subprocess.TimeoutExpired:
        answer = "no answer"
    if answer == "open":
        raise SecurityError(f"the cluster at {address} asks nobody for a token; {_WAY_OUT}")
    if answer != "token":
        raise SecurityError(
            f"whether the cluster at {address} asks for a token could not be found out ({answer}); {_WAY_OUT}"
        )

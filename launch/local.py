"""Ray clusters: started on this machine, or joined."""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from actors.ray_internals import LOCAL_ENV, job_config, shut_down
from launch.cluster_auth import check_head, check_token_file, refusal
from launch.interrupt import signals_deferred
from rayhf.errors import (
    ActorError,
    ActorLostError,
    DeadlineError,
    PlacementError,
    RayhfError,
    SecurityError,
    StorageError,
    clean_line,
    is_full_disk,
)

_TOKEN = secrets.token_hex(32)
"""Of every cluster that this process starts: Ray reads the token once in a process's life."""
_SESSION = "/rayhf-12345678/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
_MAX_PARENT = 107 - len(_SESSION)
"""Longest path, in characters, below which the paths of Ray's sockets have at most the 107 that
Linux allows."""
_KEEP_LOGS = (ActorError, ActorLostError, DeadlineError)


@contextmanager
def ray_cluster(address: str, *, cpus: float) -> Iterator[None]:
    """Connect to a Ray cluster for the duration of the block.

    Args:
        address: "local" starts a cluster with a new token, which only exists in this process's
            environment: Ray would write one to the home directory, readable by all users. Any other
            address joins a running cluster.
        cpus: that a local cluster must offer at least.

    Raises PlacementError where there is no cluster, SecurityError where it needs no token or
    another one than ours.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":
        for name, value in LOCAL_ENV.items():
            os.environ.setdefault(name, value)
        # With a token and no mode, ray.init switches authentication on, even when Ray was imported
        # long before.
        os.environ.pop("RAY_AUTH_MODE", None)
        os.environ["RAY_AUTH_TOKEN"] = _TOKEN
    else:
        check_token_file()
    import ray

    try:
        with ExitStack() as started:
            with signals_deferred():
                if address == "local":
                    _check_loopback()
                    directory = started.enter_context(_session_directory())
                    started.callback(shut_down)
                    _start_ray(directory, cpus=max(os.cpu_count() or 1, math.ceil(cpus)))
                else:
                    started.callback(shut_down)
                    ray.init(
                        address=address,
                        job_config=job_config(),
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                    )
            if address != "local":
                check_head(ray.get_runtime_context().gcs_address)
            cluster = started.pop_all()
    except ConnectionError as error:
        raise PlacementError(
            f"cluster.address {address}: no Ray cluster responds there ({error})"
        ) from None
    except ray.exceptions.AuthenticationError as error:
        raise SecurityError(f"cluster.address {address}: {refusal(error.message)}") from None
    with cluster:
        yield


def _start_ray(directory: Path, *, cpus: int) -> None:
    """Start a cluster on this machine. Raises ActorLostError where one of its processes fails."""
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            job_config=job_config(),
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(directory),
        )
    except Exception as error:  # Ray raises plain Exceptions for slow and failed processes
        line = clean_line((str(error).strip().splitlines() or [type(error).__name__])[0])
        text = f"Ray did not start on this machine: {line}"
        if is_full_disk(error):
            raise StorageError(text) from error
        raise ActorLostError(
            f"{text}; a busy machine can be too slow: the same command tries again"
        ) from error


def _check_loopback() -> None:
    """Raise PlacementError where this machine cannot connect to itself; Ray would try for long."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            pass
    except OSError as error:
        raise PlacementError(
            f"cluster.address local: this machine has no working loopback interface ({error}); "
            "`ip link set lo up` enables it"
        ) from None


@contextmanager
def _session_directory() -> Iterator[Path]:
    """Make a directory for one Ray session that only this user can read, and remove it afterwards.

    It stays, with Ray's logs, where an actor was lost or an error is unexpected.
    """
    wanted = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    parent = wanted if len(str(wanted.absolute())) <= _MAX_PARENT else Path("/tmp")
    try:
        directory = Path(tempfile.mkdtemp(prefix="rayhf-", dir=parent))
    except OSError as error:
        if is_full_disk(error):
            raise StorageError(f"{parent} cannot hold Ray's session: {error.strerror}") from None
        raise PlacementError(
            f"cluster.address local: {parent} cannot hold Ray's session ({error.strerror}); "
            f"expected a writable RAY_TMPDIR of at most {_MAX_PARENT} characters, got {wanted}"
        ) from None
    keep = False
    try:
        yield directory
    except BaseException as error:
        keep = isinstance(error, _KEEP_LOGS) or not isinstance(error, RayhfError)
        raise
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)

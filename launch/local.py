"""Ray, started here or joined."""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from launch.cluster_auth import check_head, check_token_file, refusal
from rayhf.errors import PlacementError, SecurityError

_TOKEN = secrets.token_hex(32)
"""Of every cluster that this process starts: Ray reads the token once in a process's life."""


@contextmanager
def ray_cluster(address: str, *, cpus: float) -> Iterator[None]:
    """A Ray connection for the time of the block.

    "local" starts a cluster of its own, with a fresh token that lives in this process's environment
    only (Ray would write one to the home directory, readable by all). Anything else joins a running
    cluster. Raises PlacementError where there is none, SecurityError where it asks nobody for a
    token, or has another one than we.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address == "local":
        # Every actor has an environment of its own, so the workers Ray starts ahead would only take
        # time from them.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Where there is a token and nobody has chosen, ray.init switches authentication on, also in
        # a Ray imported long before.
        os.environ.pop("RAY_AUTH_MODE", None)
        os.environ["RAY_AUTH_TOKEN"] = _TOKEN
    else:
        check_token_file()
    import ray

    try:
        if address == "local":
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise PlacementError(
            f"cluster.address {address}: no Ray cluster answers there ({error})"
        ) from None
    except ray.exceptions.AuthenticationError as error:
        raise SecurityError(f"cluster.address {address}: {refusal(error.message)}") from None
    try:
        if address != "local":
            check_head(ray.get_runtime_context().gcs_address)
        yield
    finally:
        ray.shutdown()

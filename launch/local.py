"""Ray clusters: started on this machine, or joined."""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from actors.ray_internals import LOCAL_ENV, job_config
from launch.cluster_auth import check_head, check_token_file, refusal
from rayhf.errors import PlacementError, SecurityError

_TOKEN = secrets.token_hex(32)
"""Of every cluster that this process starts: Ray reads the token once in a process's life."""


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
        if address == "local":
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
                include_dashboard=False,
                job_config=job_config(),
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            ray.init(
                address=address,
                job_config=job_config(),
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except ConnectionError as error:
        raise PlacementError(
            f"cluster.address {address}: no Ray cluster responds there ({error})"
        ) from None
    except ray.exceptions.AuthenticationError as error:
        raise SecurityError(f"cluster.address {address}: {refusal(error.message)}") from None
    try:
        if address != "local":
            check_head(ray.get_runtime_context().gcs_address)
        yield
    finally:
        ray.shutdown()

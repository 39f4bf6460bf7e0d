"""Private parts of Ray, in one place: what is used, why, and that it is there.

Read from Ray 2.60.0. tests/unit/test_ray_internals.py fails when another version changes a name or
a signature.

- `ray._private.state.available_resources_per_node`: free resources of each node. A developer API
  without a public name; `ray.available_resources` only has the cluster's sum.
- `ray._private.runtime_env.packaging.create_package`: the zip file that `ray job submit` uploads,
  with the rules of .gitignore and .rayignore. The public client zips and uploads in one step, too
  late to refuse a directory that is too large or lacks the config.
- `JobConfig(_client_job=True)`: keeps the driver's current directory from the head of the workers'
  import path, where its files would replace modules of Python's and of rayhf's. It is appended
  instead (actors/process.py).
- `ray._private.worker._global_node`: the processes of a cluster that this process started. Ray
  does not report that one of them ended (calls wait for their deadlines), and does not wait for
  what they started.
- `ray._raylet.GcsClient`: a first request to a cluster's head, without a token. `ray.init` reads
  the token of a process once and keeps it.
- `RAY_prestart_worker_first_driver`, `RAY_worker_niceness`: flags of Ray's C++ core, which has no
  other way to set them.

Run as a module with the address of a head, it prints "open" where the cluster responds without a
token and "token" where it refuses; launch/cluster_auth.py runs it in a process that has no token.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil
    from ray.job_config import JobConfig

LOCAL_ENV = {
    # Every actor has a runtime environment of its own: workers that are started ahead, without one,
    # would only take time from the actors.
    "RAY_prestart_worker_first_driver": "0",
    # The default, 15, starves the workers beside anything else that runs on this machine.
    "RAY_worker_niceness": "0",
}
"""Environment variables for a cluster that is started here."""
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_TIMEOUT_S = 5
_EXIT_S = 2.0


def free_resources() -> dict[str, dict[str, float]]:
    """Return what is free on each live node, by node id and resource."""
    from ray._private.state import available_resources_per_node

    free: dict[str, dict[str, float]] = available_resources_per_node()
    return free


def dead_processes() -> list[str]:
    """Return which processes of the cluster that this process started have ended."""
    from ray._private import worker

    node = worker._global_node
    return [] if node is None else [name for name, _ in node.dead_processes()]


def shut_down() -> None:
    """Disconnect from Ray, and end the cluster that this process started with all its processes.

    Ray itself leaves its agents, which take up to 90 s to notice; and where one of the cluster's
    processes has ended, the others would wait for it.
    """
    import psutil
    import ray
    from ray._private import worker

    node = worker._global_node
    started: list[psutil.Process] = []
    for _, process in node.live_processes() if node is not None else ():
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(process.pid)
            started += [top, *top.children(recursive=True)]
    if dead_processes():
        _kill(started)
    ray.shutdown()
    _, left = psutil.wait_procs(started, timeout=_EXIT_S)
    _kill(left)


def _kill(processes: Iterable[psutil.Process]) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def create_package(directory: Path, file: Path, *, excludes: Sequence[str]) -> None:
    """Zip a working directory as Ray does, without what .gitignore and .rayignore name."""
    from ray._private.runtime_env import packaging

    packaging.create_package(
        str(directory),
        file,
        include_gitignore=True,
        excludes=list(excludes),
        logger=logging.getLogger(__name__),
    )


def job_config() -> JobConfig | None:
    """Return the options of a job whose workers do not import from the current directory first.

    None in a job that `ray job submit` started: it brings its own.
    """
    from ray.job_config import JobConfig

    return None if _SUBMITTED in os.environ else JobConfig(_client_job=True)


def access(address: str) -> str:
    """Return "open" where a cluster responds to this process, "token" where it requires one."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # a compiled module
    from ray.exceptions import AuthenticationError

    try:
        GcsClient(address=address).get_all_node_info(timeout=_TIMEOUT_S)
    except AuthenticationError:
        return "token"
    return "open"


if __name__ == "__main__":
    print(access(sys.argv[1]))  # noqa: T201

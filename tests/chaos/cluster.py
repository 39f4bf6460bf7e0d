"""A Ray cluster of two nodes on this machine: a head without CPUs, and a worker to kill."""

from __future__ import annotations

import os
import secrets
import signal
from types import TracebackType
from typing import Any

import psutil


class TwoNodes:
    """Two nodes; the head has no CPUs, so that every actor runs on the worker."""

    def __init__(self) -> None:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ |= {"RAY_prestart_worker_first_driver": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.address: str = self._cluster.address
        self._worker: Any = None

    def __enter__(self) -> TwoNodes:
        self.add_worker()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cluster.shutdown()

    def add_worker(self) -> None:
        self._worker = self._cluster.add_node(num_cpus=4)

    def kill_worker(self) -> None:
        """Kill the raylet and every process on its node."""
        raylet = psutil.Process(self._worker.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self._cluster.remove_node(self._worker, allow_graceful=False)

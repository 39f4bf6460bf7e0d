"""A campaign's share of a Ray cluster: a placement group that holds all actors.

Its resources are reserved before any model loads.

In: actor specs. Out: scheduled actors.

Synchronization: `reserve` waits for the cluster, up to a limit, and reports every few seconds what
is missing. A cluster that was started here for this campaign has room at once or never; it has a
group too where there are GPUs, because only a bundle puts several actors on the same one.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup as RayPlacementGroup
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from actors.ray_internals import free_resources
from rayhf.errors import PlacementError
from rayhf.planning.placement import ActorSpec, NodeResources, bundles, crowded, impossible

_POLL_S = 0.5
_REPORT_S = 5.0
_QUERY_S = 30.0
_CREATE_S = 30.0
"""Time in which Ray creates a group for which there is room."""


def nodes_now() -> list[NodeResources]:
    """Return the live nodes with their total and free resources."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    free = free_resources()
    count = Counter(node["NodeManagerAddress"] for node in alive)
    nodes = []
    for node in alive:
        address = node["NodeManagerAddress"]
        name = address if count[address] == 1 else f"{address}/{node['NodeID'][:6]}"
        nodes.append(
            NodeResources(name=name, total=node["Resources"], free=free.get(node["NodeID"], {}))
        )
    return nodes


class PlacementGroup:
    """Resources of a cluster that a campaign holds, and the actors on them.

    Args:
        specs: the campaign's actors.
        grouped: reserve the resources: others use the cluster too, or actors share GPUs.
    """

    def __init__(self, specs: Sequence[ActorSpec], *, grouped: bool) -> None:
        self._specs = specs
        self._grouped = grouped
        self._group: RayPlacementGroup | None = None
        self._ready: ray.ObjectRef | None = None

    async def reserve(self, *, limit_s: float, report: Callable[[str], None]) -> None:
        """Hold the resources of every actor.

        Args:
            limit_s: time to wait for room; 0 for a cluster whose nodes are all there.
            report: receives what is missing, every few seconds.

        Raises PlacementError, naming what was requested and what is available: at once for actors
        that a cluster with all its nodes can never hold, else after `limit_s` seconds.
        """
        started = time.monotonic()
        reported = started
        if limit_s == 0:
            if problem := impossible(self._specs, nodes_now()):
                raise PlacementError(f"no room in the cluster: {problem}")
            limit_s = _CREATE_S
        if self._grouped:
            # Requested also where there is no room yet: an autoscaler acts on pending requests.
            self._group = ray.util.placement_group(bundles(self._specs), strategy="PACK")
            self._ready = self._group.ready()
        while not self._reserved():
            now = time.monotonic()
            if now - started >= limit_s:
                shortage = self._shortage()
                self.release()
                raise PlacementError(f"no room in the cluster after {limit_s:g} s: {shortage}")
            if now - reported >= _REPORT_S:
                report(f"waiting for room: {self._shortage()}")
                reported = now
            await asyncio.sleep(_POLL_S)

    def _reserved(self) -> bool:
        if self._group is None:
            return impossible(self._specs, nodes_now()) is None
        return bool(ray.wait([self._ready], timeout=0)[0])

    def _shortage(self) -> str:
        nodes = nodes_now()
        return impossible(self._specs, nodes) or crowded(self._specs, nodes)

    def create(
        self, actor_class: type, spec: ActorSpec, env: Mapping[str, str], **options: object
    ) -> ActorHandle:
        """Create an actor on its resources.

        Args:
            actor_class: the plain class.
            spec: one of the specs that were reserved.
            env: environment variables of the actor's process.
            options: further ones of `ray.remote`.
        """
        # Ray must not restart anything by itself: a replacement has to be built and synced first.
        remote = ray.remote(
            num_cpus=spec.cpus,
            num_gpus=spec.gpus,
            resources=dict(spec.resources),
            runtime_env={"env_vars": dict(env)},
            max_restarts=0,
            max_task_retries=0,
            **self.strategy(spec),
            **options,
        )
        return remote(actor_class).remote()

    def strategy(self, spec: ActorSpec) -> dict[str, PlacementGroupSchedulingStrategy]:
        """Return the options that put an actor into its bundle."""
        if self._group is None:
            return {}
        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=spec.bundle
            )
        }

    def release(self) -> None:
        """Give the resources back; safe to call twice."""
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
            self._group = None


def smallest_gpu() -> float | None:
    """Return the memory of the cluster's smallest GPU in bytes; None where no node knows.

    Each node asks its own nvidia-smi.
    """
    query = ray.remote(num_cpus=0)(_gpu_bytes)
    nodes = [
        node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")
    ]
    if not nodes:
        return None
    calls = [
        query.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    ]
    finished, _ = ray.wait(calls, num_returns=len(calls), timeout=_QUERY_S)
    return min((size for sizes in ray.get(finished) for size in sizes), default=None)


def _gpu_bytes() -> list[float]:
    """Return the memory of each GPU of this node."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_QUERY_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []  # another vendor's GPUs: set cluster.gpu_memory_gib instead
    lines = result.stdout.splitlines()
    return [float(line) * 2**20 for line in lines if line.strip().isdigit()]

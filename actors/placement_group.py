"""PlacementGroup for a campaign in a Ray cluster: a placement group that holds every spec before any model
loads.

Who waits for whom: `take` waits for the cluster, at most so long, and says every few seconds what
is missing. A cluster that was started here for this campaign has room or never will.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray._private.state import (
    available_resources_per_node,  # a developer API that has no public name
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from rayhf.errors import PlacementError
from rayhf.planning.placement import ActorSpec, NodeResources, bundles, crowded, impossible

_POLL_S = 0.5
_SAY_S = 5.0
_ASK_S = 30.0


def nodes_now() -> list[NodeResources]:
    """The nodes that are alive, with what each has and what is free there."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    free = available_resources_per_node()
    addresses = Counter(node["NodeManagerAddress"] for node in alive)
    return [
        NodeResources(
            name=address
            if addresses[address := node["NodeManagerAddress"]] == 1
            else f"{address}/{node['NodeID'][:6]}",
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
        )
        for node in alive
    ]


class PlacementGroup:
    """What a campaign holds of a cluster. `grouped`: others may use the cluster, or it decides who
    sits on which GPU."""

    def __init__(self, found: Sequence[ActorSpec], *, grouped: bool) -> None:
        self._seats, self._grouped = found, grouped
        self._group: Any = None
        self._ready: Any = None

    async def take(self, *, limit_s: float, report: Callable[[str], None]) -> None:
        """Hold every spec. Raises PlacementError, naming what was asked for and what is there,
        after `limit_s` seconds."""
        started = said = time.monotonic()
        if self._grouped and limit_s > 0:
            # Asked for at once, and also where it cannot be had yet: an autoscaler acts on what is
            # pending.
            self._group = ray.util.placement_group(bundles(self._seats), strategy="PACK")
            self._ready = self._group.ready()
        while not self._taken():
            now = time.monotonic()
            if now - started >= limit_s:
                why = self._why()
                self.leave()
                raise PlacementError(
                    f"no room in the cluster{f' after {limit_s:g} s' if limit_s else ''}: {why}"
                )
            if now - said >= _SAY_S:
                report(f"waiting for room: {self._why()}")
                said = now
            await asyncio.sleep(_POLL_S)

    def _taken(self) -> bool:
        if self._group is None:
            return impossible(self._seats, nodes_now()) is None
        return bool(ray.wait([self._ready], timeout=0)[0])

    def _why(self) -> str:
        nodes = nodes_now()
        return impossible(self._seats, nodes) or crowded(self._seats, nodes)

    def strategy(self, spec: ActorSpec) -> dict[str, Any]:
        """Options that put an actor into its spec's bundle."""
        if self._group is None:
            return {}
        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=spec.bundle
            )
        }

    def leave(self) -> None:
        """Safe to call twice."""
        if self._group is not None:
            ray.util.remove_placement_group(self._group)
            self._group = None


def smallest_gpu() -> float | None:
    """Memory of the smallest GPU in the cluster in bytes, as nvidia-smi says on each node; None
    where none says."""
    ask = ray.remote(num_cpus=0)(_gpu_bytes)
    nodes = [
        node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")
    ]
    calls = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    ]
    answered, _ = ray.wait(calls, num_returns=len(calls), timeout=_ASK_S) if calls else ([], [])
    found = [amount for amounts in ray.get(answered) for amount in amounts]
    return min(found, default=None)


def _gpu_bytes() -> list[float]:
    """Of this node's GPUs."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=_ASK_S, check=True
        ).stdout
    except (
        OSError,
        subprocess.SubprocessError,
    ):  # another vendor's; cluster.gpu_memory_gib says it then
        return []
    return [float(line) * 2**20 for line in said.splitlines() if line.strip().isdigit()]

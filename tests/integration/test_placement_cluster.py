"""PlacementGroup in real Ray clusters of one and two nodes on this machine."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.environment import process_env
from actors.placement_group import PlacementGroup, nodes_now
from rayhf.config.load import load_config
from rayhf.errors import PlacementError
from rayhf.planning.placement import ActorSpec, actor_specs

COLOCATED = Path(__file__).parents[2] / "configs/recipes/online_dpo_8b_8gpu_colocate.yaml"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes; only the second one has a `scale`."""
    from ray.cluster_utils import Cluster

    from launch import local

    # A process has one token in its life, from its first ray.init, here or in another test.
    with local.ray_cluster("local", cpus=1):
        os.environ["RAY_AUTH_MODE"] = "token"
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    # GPUs are numbers to Ray: an actor's own ones are what it finds in CUDA_VISIBLE_DEVICES.
    cluster.add_node(num_cpus=3, num_gpus=2, resources={"scale": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    del os.environ["RAY_AUTH_MODE"]


def spec(name: str, bundle: int, cpus: float = 0.25, **resources: float) -> ActorSpec:
    return ActorSpec(
        role=name, index=0, name=name, cpus=cpus, gpus=0.0, resources=resources, bundle=bundle
    )


def reserve(group: PlacementGroup, limit_s: float) -> list[str]:
    reports: list[str] = []
    asyncio.run(group.reserve(limit_s=limit_s, report=reports.append))
    return reports


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([spec("scorer", 0, moon=1)], "1 moon requested (scorer 1), 0 available on 2 node(s)"),
        (
            [spec("scorer", 0, cpus=100), spec("judge", 1)],
            "100.25 CPU requested (scorer 100, judge 0.25), 5 available on 2 node(s)",
        ),
        ([spec("scorer", 0, cpus=4)], "scorer needs 4 CPU on one node; the best one, "),
    ],
)
def test_actors_that_can_never_be_placed_are_refused(
    cluster: Any, specs: list[ActorSpec], expected: str
) -> None:
    with pytest.raises(PlacementError) as error:
        reserve(PlacementGroup(specs, grouped=True), 2.0)
    assert expected in str(error.value) and "no room in the cluster after 2 s" in str(error.value)
    with pytest.raises(PlacementError):  # at once where no node can be added
        reserve(PlacementGroup(specs, grouped=False), 0.0)
    assert "\n" not in str(error.value)


def test_resources_are_reserved_and_released(cluster: Any) -> None:
    specs = [
        spec("learner", 0, cpus=1),
        spec("rollout", 1, cpus=1, scale=1),
        replace(spec("reference", 1), index=1),
    ]
    group = PlacementGroup(specs, grouped=True)
    reserve(group, 20.0)

    @ray.remote
    def node() -> str:
        return str(ray.get_runtime_context().get_node_id())

    homes = {
        one.name: ray.get(
            node.options(
                num_cpus=one.cpus, resources=dict(one.resources), **group.strategy(one)
            ).remote(),
            timeout=60,
        )
        for one in specs
    }
    (scale,) = [n["NodeID"] for n in ray.nodes() if "scale" in n["Resources"]]
    assert homes["rollout"] == homes["reference"] == scale
    reports: list[str] = []
    rival = PlacementGroup([spec("scorer", 0, scale=1)], grouped=True)
    with pytest.raises(
        PlacementError,
        match=r"scorer needs 1 scale and 0.25 CPU .* has left 0 scale and [\d.]+ CPU$",
    ):
        asyncio.run(rival.reserve(limit_s=6.0, report=reports.append))
    assert reports and reports[0].startswith("waiting for room: scorer needs 1 scale")
    group.release()
    reserve(PlacementGroup([spec("scorer", 0, scale=1)], grouped=True), 20.0)
    assert len({node.name for node in nodes_now()}) == 2


class Devices:
    """Actor that reports the GPUs and the threads that its libraries would use."""

    def visible(self) -> tuple[str | None, str | None]:
        return os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")


def test_colocated_engines_and_ranks_share_a_gpu_each_on_a_local_cluster(
    cluster: Any,
) -> None:
    config = load_config(COLOCATED, ["rollout.engines=2", "learner.ranks=2"])
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    specs = [replace(one, cpus=0.25) for one in actor_specs(config, critic=False, reference=False)]
    group = PlacementGroup(specs, grouped=True)
    reserve(group, 0.0)  # as on a cluster that was started here
    actors = [
        (one.name, group.create(Devices, one, process_env("gpu", 7, vllm=False)))
        for one in specs
        if one.role in ("rollout", "learner")
    ]
    calls = [actor.visible.remote() for _, actor in actors]
    seen = dict(zip([name for name, _ in actors], ray.get(calls, timeout=120), strict=True))
    for _, actor in actors:
        ray.kill(actor)
    group.release()
    gpu_of = {name: gpu for name, (gpu, _) in seen.items()}
    assert gpu_of["rollout engine 0"] == gpu_of["learner rank 0"]
    assert gpu_of["rollout engine 1"] == gpu_of["learner rank 1"]
    assert {gpu_of["rollout engine 0"], gpu_of["rollout engine 1"]} == {"0", "1"}
    assert {threads for _, threads in seen.values()} == {"7"}, "Ray would set 1"

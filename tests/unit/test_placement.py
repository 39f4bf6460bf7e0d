"""Who sits where, and refusals before anything starts."""

from pathlib import Path

import pytest

from actors.placement import bundles, check_available, seats
from rayhf.config.load import load_config
from rayhf.errors import ConfigError, PlacementError

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"


def node(gpus, cpus=64.0, alive=True):
    return {"Alive": alive, "Resources": {"GPU": gpus, "CPU": cpus}}


def test_separate_roles_have_their_own_gpus():
    config = load_config(RECIPES / "ppo_8b_8gpu_separate.yaml")
    found = seats(config, critic=True, reference=True)
    assert sum(seat.gpus for seat in found) == 8 and len({seat.bundle for seat in found}) == len(found)
    check_available(found, [node(4), node(4)])
    with pytest.raises(
        PlacementError, match=r"8 GPUs requested, 4 available on 1 node\(s\) \(GPUs by role: rollout 2, learner 2"
    ):
        check_available(found, [node(4), node(8, alive=False)])


def test_colocated_roles_share_every_gpu():
    config = load_config(RECIPES / "online_dpo_8b_8gpu_colocate.yaml")
    found = seats(config, critic=False, reference=True)
    wanted = bundles(found)
    assert [b["GPU"] for b in wanted] == [1.0] * 8
    for number in range(8):
        members = [seat for seat in found if seat.bundle == number]
        assert {"rollout", "learner"} <= {seat.role for seat in members} and sum(seat.gpus for seat in members) <= 1


def test_a_bundle_larger_than_any_node_is_found():
    config = load_config(RECIPES / "ppo_8b_8gpu_separate.yaml", ["rollout.tensor_parallel=4", "rollout.engines=1"])
    found = seats(config, critic=True, reference=True)
    with pytest.raises(PlacementError, match="one bundle needs 4 GPUs, the largest node has 2"):
        check_available(found, [node(2)] * 6)


def test_shares_of_a_gpu_and_tensor_parallel_exclude_each_other():
    config = load_config(RECIPES / "online_dpo_8b_8gpu_colocate.yaml", ["rollout.tensor_parallel=2"])
    with pytest.raises(ConfigError, match=r"tensor_parallel is 2, expected 1 \(or placement separate\)"):
        seats(config, critic=False, reference=True)

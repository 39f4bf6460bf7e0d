"""Placement of actors on nodes, and refusals before anything starts."""

from pathlib import Path

import pytest

from launch.assemble import environment, threads_of
from rayhf.config.load import load_config
from rayhf.errors import ConfigError
from rayhf.planning.placement import (
    NodeResources,
    actor_specs,
    bundles,
    cores_per_gpu,
    crowded,
    impossible,
    members,
    pack,
)
from rayhf.planning.preflight import check_settings

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
PPO = RECIPES / "ppo_8b_8gpu_separate.yaml"
ONLINE = RECIPES / "online_dpo_8b_8gpu_colocate.yaml"
ITERATIVE = RECIPES / "iterative_dpo_8b_8gpu_colocate.yaml"
TINY = RECIPES.parent / "tiny" / "online_dpo_arithmetic.yaml"


def node(gpus, cpus=64.0, name="10.0.0.1", used=0.0, **custom):
    total = {"GPU": gpus, "CPU": cpus, **custom}
    return NodeResources(name=name, total=total, free={**total, "GPU": gpus - used})


def placed(path, *overrides, critic=False, reference=True, **more):
    return actor_specs(load_config(path, overrides), critic=critic, reference=reference, **more)


def names(group):
    return [spec.name for spec in group]


def test_separate_roles_have_their_own_gpus():
    specs = placed(PPO, critic=True)
    assert sum(spec.gpus for spec in specs) == 8
    assert len({spec.bundle for spec in specs}) == len(specs)
    assert impossible(specs, [node(4), node(4, name="10.0.0.2")]) is None
    assert impossible(specs, [node(4)]) == (
        "8 GPU requested (rollout 2, learner 2, critic 2, reference 1, scorer 1), 4 available "
        "on 1 node(s)"
    )


def test_colocated_roles_share_every_gpu():
    specs = placed(ITERATIVE)
    assert [b["GPU"] for b in bundles(specs)] == [1.0] * 8
    for group in members(specs):
        assert {"rollout", "learner"} <= {spec.role for spec in group} and sum(
            spec.gpus for spec in group
        ) <= 1


def test_shares_of_six_actors_add_up_to_one_gpu():
    """Ray's shares must add up to at most 1.

    Engine, learner, critic, reference, reward model, and an evaluator with one.
    """
    reward = "{type: reward_model, model: models/reward-8b}"
    overrides = ["cluster.placement=colocate", "run.max_staleness=0", f"scorer.evaluate=[{reward}]"]
    first, *others = members(placed(PPO, *overrides, critic=True))
    assert len(first) == 6 and all(spec.gpus == 0.1666 for spec in first)
    assert [b["GPU"] for b in bundles(placed(PPO, *overrides, critic=True))] == [1.0] * (
        1 + len(others)
    )


def test_shares_of_a_gpu():
    specs = placed(
        PPO, "cluster.gpus_per_reference=0.5", "cluster.gpus_per_scorer=0.25", critic=True
    )
    shares = {spec.name: spec.gpus for spec in specs}
    assert (shares["reference"], shares["scorer"]) == (0.5, 0.25)
    requests = bundles(specs)
    assert sorted(b["GPU"] for b in requests) == [0.25, 0.5, 1, 1, 1, 1, 1, 1]
    assert None not in pack(requests, [node(6), node(1, name="10.0.0.2")])  # both shares on one GPU
    assert impossible(specs, [node(6)]) is not None


def test_roles_with_gpus_of_their_own_leave_the_shared_gpus():
    specs = placed(ITERATIVE, "cluster.gpus_per_reference=1", "cluster.gpus_per_scorer=0.5")
    *shared, reference, scorer = members(specs)
    assert all(
        names(group) == [f"rollout engine {i}", f"learner rank {i}"]
        for i, group in enumerate(shared)
    )
    assert [(names(g), g[0].gpus) for g in (reference, scorer)] == [
        (["reference"], 1.0),
        (["scorer"], 0.5),
    ]
    assert [b["GPU"] for b in bundles(specs)] == [1.0] * 9 + [0.5]


def test_ranks_of_the_reference_are_placed_as_a_learners():
    specs = placed(PPO, "reference.ranks=2", critic=True)
    assert [(spec.name, spec.gpus) for spec in specs if spec.role == "reference"] == [
        ("reference rank 0", 1.0),
        ("reference rank 1", 1.0),
    ]
    assert sum(spec.gpus for spec in specs) == 9
    first, second, third, *_ = map(names, members(placed(ITERATIVE, "reference.ranks=2")))
    assert "reference rank 0" in first and "reference rank 1" in second
    assert not any(name.startswith("reference") for name in third)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["reference.replicas=2"],
            r"reference\.replicas is 2 and reference\.ranks 2; expected replicas=1",
        ),
        (
            ["cluster.device=cpu", "policy.dtype=float16"],
            r"policy\.dtype is float16 and reference\.ranks 2: .* expected float32 or bfloat16",
        ),
        (
            ["cluster.gpus_per_reference=0.5"],
            r"gpus_per_reference is 0\.5, and each of the 2 .* GPU of its own \(NCCL\); expected 1",
        ),
    ],
)
def test_sharded_reference_that_cannot_be_placed_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(load_config(PPO, ["reference.ranks=2", *overrides]))


def test_gpu_actors_share_the_cores_of_their_node():
    """Ray alone would give each of them one thread, also to an optimizer in host memory."""
    nodes = [node(8, cpus=96), node(8, cpus=64), node(0, cpus=4)]
    assert cores_per_gpu(nodes) == 8
    assert cores_per_gpu([node(0)]) is None
    assert cores_per_gpu([node(4, cpus=2)]) == 1
    config = load_config(PPO)
    env = environment(config, "learner", critic=True, gpu_cores=8)
    assert env["OMP_NUM_THREADS"] == "8"
    assert "OMP_NUM_THREADS" not in environment(config, "rollout", critic=True, gpu_cores=8)
    stated = load_config(PPO, ["learner.threads=3"])
    assert environment(stated, "critic", critic=True, gpu_cores=8)["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"rollout": 4, "reference": 8, "learner": 8}),
        (["rollout.engines=2"], {"rollout": 4, "learner": 8}),
        (["rollout.engines=4"], {"rollout": 2, "learner": 8}),
        (["run.max_staleness=1"], {"rollout": 4, "reference": 4, "learner": 4}),
        (["reference.stream=on"], {"rollout": 4, "reference": 4, "learner": 8}),
        (["reference.replicas=4"], {"rollout": 4, "reference": 2}),
        (["rollout.threads=3", "run.max_staleness=1"], {"rollout": 3, "learner": 4}),
    ],
)
def test_cpu_actors_share_the_cores_with_those_that_work_at_the_same_time(
    monkeypatch, overrides, expected
):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    config = load_config(TINY, overrides)
    threads = {role: threads_of(config, role, critic=False) for role in expected}
    assert threads == expected


def test_custom_resources_pin_pools_to_nodes():
    """Also on CPU. The critic is in the learner's pool, evaluators are in the scorer's."""
    overrides = [
        "cluster.resources={rollout: {fast: 1}, learner: {slow: 0.25}, scorer: {judging: 1}}",
        "scorer.evaluate=[{type: rule, function: 'a:b'}]",
    ]
    specs = placed(TINY, *overrides, critic=True)
    resources = {spec.name: dict(spec.resources) for spec in specs}
    assert resources == {
        "rollout engine 0": {"fast": 1},
        "learner rank 0": {"slow": 0.25},
        "critic rank 0": {"slow": 0.25},
        "reference": {},
        "scorer": {"judging": 1},
        "evaluator": {"judging": 1},
    }
    one, two = node(0, 4, "a", fast=1, judging=2), node(0, 4, "b", slow=1)
    homes = dict(zip(resources, pack(bundles(specs), [one, two]), strict=True))
    assert (
        homes["learner rank 0"] == homes["critic rank 0"] == "b"
        and homes["rollout engine 0"] == homes["evaluator"] == "a"
    )
    assert impossible(specs, [one]) == (
        "0.5 slow requested (learner 0.25, critic 0.25), 0 available on 1 node(s)"
    )


def test_bundle_larger_than_any_node():
    specs = placed(PPO, "rollout.tensor_parallel=4", "rollout.engines=1", critic=True)
    nodes = [node(2, name=f"10.0.0.{i}") for i in range(6)]
    assert impossible(specs, nodes) == (
        "rollout engine 0 needs 4 GPU and 1 CPU on one node; the best one, 10.0.0.0, has 2 GPU "
        "and 64 CPU"
    )


def test_bundle_without_room_among_free_resources():
    specs = placed(PPO, critic=True)
    nodes = [node(4, used=1), node(4, name="10.0.0.2", used=3)]
    assert impossible(specs, nodes) is None
    assert crowded(specs, nodes) == (
        "critic rank 0 needs 1 GPU and 1 CPU on one node; the best one, 10.0.0.1, has left 0 GPU "
        "and 61 CPU; 4 of 8 bundles have no room"
    )


def test_every_policy_has_engines_and_learners():
    specs = placed(RECIPES / "spar_8b_8gpu_separate.yaml", policies=("policy", "refiner"))
    assert {"rollout refiner engine 0", "learner refiner rank 1"} <= set(names(specs))
    assert sum(spec.gpus for spec in specs) == 7


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["rollout.tensor_parallel=2"],
            r"tensor_parallel is 2, expected 1 \(or placement separate\)",
        ),
        (["run.max_staleness=1"], r"max_staleness is 1, expected 0 \(or placement separate\)"),
        (
            ["scorer.train=[{type: judge, model: m}]"],
            "the judge m would take most of a GPU that it shares",
        ),
        (
            ["cluster.resources={rollout: {GPU: 2}}"],
            "rollout.GPU is derived; expected custom resources",
        ),
        (
            ["cluster.resources={rollout: {h100: 1.5}}"],
            "rollout.h100 is 1.5; Ray counts more than 1 in whole numbers",
        ),
        (
            ["cluster.gpus_per_scorer=2"],
            "cluster.gpus_per_scorer: input should be less than or equal to 1, got 2",
        ),
        (
            ["cluster.resources={engines: {h100: 1}}"],
            "'rollout', 'learner', 'reference' or 'scorer', got 'engines'",
        ),
    ],
)
def test_placements_that_cannot_work(overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        placed(ONLINE, *overrides)

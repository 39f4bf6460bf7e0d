"""Estimates of memory, disk and pace against arithmetic by hand for Llama 3.1 8B."""

import json

import pytest
from llama_config import LLAMA

from rayhf.config.load import load_config
from rayhf.config.schema import LearnerConfig, LoraConfig, ReferenceConfig, RolloutConfig, RunConfig
from rayhf.errors import ConfigError, PlacementError
from rayhf.planning.disk import Disk, disk
from rayhf.planning.host import check_hosts, host_bytes
from rayhf.planning.memory import (
    GIB,
    engine_memory,
    learner_memory,
    logits_bytes,
    reference_memory,
    sequences_in_cache,
)
from rayhf.planning.pace import seconds_per_iteration
from rayhf.planning.placement import NodeResources, actor_specs
from rayhf.planning.plan import Plan, check_disk, check_gpus
from rayhf.planning.preflight import check_settings
from rayhf.planning.shape import read_shape
from rayhf.scorer.judge_config import JudgeConfig

P = 8_030_261_248
"""Parameters of Llama 3.1 8B."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    (directory / "config.json").write_text(json.dumps(LLAMA))
    return directory


@pytest.fixture(scope="module")
def shape(model):
    return read_shape(model, key="policy.model")


def learner(shape, *, lora=None, critic=False, **config):
    settings = {
        "dtype": "bfloat16",
        "zero_stage": 3,
        "ranks": 8,
        "token_budget": 16384,
        "activation_checkpointing": True,
    }
    return learner_memory(
        shape, LearnerConfig(**{**settings, **config}), device="gpu", lora=lora, critic=critic
    )


def test_shape_is_read_without_weights(shape):
    assert shape.parameters == P
    assert (shape.layers, shape.hidden, shape.kv_heads, shape.head_dim, shape.vocabulary) == (
        32,
        4096,
        8,
        128,
        128256,
    )
    # Per layer rank x (in + out) of q, k, v, o, gate, up, down.
    per_rank = (4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3
    assert shape.adapters(LoraConfig(rank=16)) == 16 * 32 * per_rank == 41_943_040
    assert shape.adapters(LoraConfig(rank=16, target_modules=("q_proj", "v_proj"))) == 16 * 32 * (
        8192 + 5120
    )


def test_zero_3_on_eight_gpus(shape):
    """2 + 4 + 12 bytes of P / 8, and DeepSpeed's buffers in bfloat16.

    It gathers a billion parameters and half a billion gradients.
    """
    memory = learner(shape)
    assert (
        memory.weights == P * 2 / 8
        and memory.gradients == P * 4 / 8
        and memory.optimizer == P * 12 / 8
    )
    assert memory.buffers == 2 * 1.5e9
    # Kept: 32 inputs of 4,096 bfloat16 numbers and one layer; a layer: two norms of 8 x 4,096
    # bytes, in bfloat16 twice 4,096 of q and attention, twice 1,024 of k and v, 4 x 14,336 of the
    # MLP, 32 float32 sums. Passing: 3 x 4,096 + 3 x 14,336.
    layer = 2 * 8 * 4096 + 2 * (2 * 4096 + 2 * 1024 + 4 * 14336) + 4 * 32
    assert memory.activations == 16384 * (32 * 8192 + layer + 5 * 8192 + 2 * (3 * 4096 + 3 * 14336))
    # 1,046 tokens at a time: logits, float32 logits, float32 gradient. And the gradient of the
    # head's weights twice, of one piece and of those before it.
    assert memory.logits == (1 << 27) * 10 + 2 * 2 * 128256 * 4096
    assert 33 * GIB < memory.total < 35 * GIB


@pytest.mark.parametrize(
    ("config", "weights", "gradients", "optimizer"),
    [
        ({"zero_stage": 2}, 2 * P, P / 2, 12 * P / 8),
        ({"zero_stage": 1}, 2 * P, 6 * P, 12 * P / 8),
        ({"zero_stage": 0}, 2 * P, 6 * P, 12 * P / 8),  # runs as 1
        ({"zero_stage": 0, "dtype": "float32"}, 4 * P, 4 * P, 8 * P),
        ({"zero_stage": 2, "dtype": "float32"}, 4 * P, P / 2, 12 * P / 8),
        ({"zero_stage": 3, "dtype": "float32"}, P / 2, P / 2, 8 * P / 8),
        ({"zero_stage": 3, "offload": True}, P / 4, 2 * 5e8, 0),
    ],
)
def test_stages_and_dtypes(shape, config, weights, gradients, optimizer):
    memory = learner(shape, **config)
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, gradients, optimizer)


def test_with_lora_only_adapters_have_gradients_and_moments(shape):
    lora = LoraConfig(rank=16)
    memory = learner(shape, lora=lora, ranks=1, zero_stage=2)
    assert (memory.weights, memory.gradients, memory.optimizer) == (
        2 * P,
        4 * 41_943_040,
        12 * 41_943_040,
    )


def test_critic_has_no_logits_and_checkpointing_keeps_little(shape):
    assert learner(shape, critic=True).logits == 0
    assert learner(shape, critic=True).weights == (P - 128256 * 4096 + 4096) * 2 / 8
    assert (
        learner(shape, activation_checkpointing=False).activations > 9 * learner(shape).activations
    )


def test_peak_is_a_step_that_copies_more_than_the_activations(shape):
    """Stage 2 copies float32 gradients once more after the activations are freed."""
    memory = learner(shape, zero_stage=2, ranks=1, token_budget=256, dtype="float32")
    assert memory.activations + memory.logits + memory.buffers == 4 * P


def test_logits_have_a_maximum(shape):
    assert logits_bytes(shape, "float32", 100, backward=True) == 100 * 128256 * 8
    assert logits_bytes(shape, "float32", 10**6, backward=True) == (1 << 27) * 8
    assert logits_bytes(shape, "float32", 10**6, backward=True, entropy=True) == (1 << 27) * 12
    assert logits_bytes(shape, "float32", 10**6, backward=True, scaled=True) == (1 << 27) * 12
    assert logits_bytes(shape, "bfloat16", 10**6, backward=True, scaled=True) == (1 << 27) * 10
    assert logits_bytes(shape, "float32", 100, backward=True, trained=True) == 100 * 128256 * 8


def test_engine_cache_gets_the_rest_of_the_gpu(shape):
    config = RolloutConfig(memory_fraction=0.9)
    memory = engine_memory(shape, config, dtype="bfloat16", device="gpu", gpu_bytes=80 * GIB)
    assert memory.total == pytest.approx(72 * GIB) and memory.weights == 2 * P
    # A token's keys and values: 2 x 32 layers x 8 heads x 128 x 2 bytes.
    fitting = sequences_in_cache(
        shape, memory.cache, dtype="bfloat16", length=4096, tensor_parallel=1
    )
    assert fitting == pytest.approx(memory.cache / (131072 * 4096)) and 100 < fitting < 110
    halves = engine_memory(
        shape, config.model_copy(update={"tensor_parallel": 2}), dtype="bfloat16", device="gpu"
    )
    assert halves.weights == P and halves.cache == 0  # the GPU is unknown


def test_reference(shape):
    memory = reference_memory(
        shape, ReferenceConfig(token_budget=8192), dtype="bfloat16", device="gpu"
    )
    assert (
        memory.weights == 2 * P
        and memory.logits == (1 << 27) * 10
        and memory.optimizer == memory.gradients == 0
    )


def test_rank_of_a_sharded_reference(model):
    """A part of the weights, the parameters that are gathered at a time, and one average."""
    plan, specs = campaign(
        model,
        cluster={"placement": "separate"},
        reference={"ranks": 4},
        algorithm={"reference": {"type": "ema", "every": 1}},
    )
    needs = [need for need in plan.needs(specs, 80 * GIB) if need.spec.role == "reference"]
    assert [need.spec.name for need in needs] == [f"reference rank {i}" for i in range(4)]
    for need in needs:
        assert (need.memory.weights, need.memory.buffers) == (2 * P / 4, 2e9)
    average, *others = [host_bytes(plan, need) for need in needs]
    assert average - others[0] == 4 * P and len(set(others)) == 1


def test_disk():
    run = RunConfig(dir="r", iterations=100, checkpoint_every=10, keep_checkpoints=2, keep_every=20)
    size = disk(
        run,
        trained=[1000, 500],
        reference=100.0,
        exported=2000.0,
        samples=8,
        tokens=10,
        length=30,
    )
    assert size == Disk(
        checkpoint=12 * 1500 + 100,
        kept=2 + 5 + 1,
        policies=2000.0,
        samples=8 * (2 * (120 + 80) + 200),
        iterations=110,
    )
    assert size.total == 9 * 18100 + 4000 + 110 * 4800
    config = {"model": "j", "votes": 3, "temperature": 0.7, "max_tokens": 100}
    judged = [JudgeConfig(**config), JudgeConfig(**config, mode="pairwise", keep_replies=5)]
    assert [entry.reply_bytes for entry in judged] == [3 * 400, 5 * 400]
    words = disk(
        run, trained=[1], reference=0, exported=0, samples=8, tokens=10, length=30, replies=1200
    )
    assert words.samples == size.samples + 8 * 1200
    few = run.model_copy(update={"iterations": 10, "keep_every": 0})
    assert disk(few, trained=[1], reference=0, exported=0, samples=1, tokens=1, length=2).kept == 1


def campaign(model, **sections):
    data = {
        "run": {"dir": "r", "iterations": 3},
        "policy": {"model": str(model), "max_length": 4096},
        "prompts": {"train": "t", "batch": 64},
        "algorithm": {"type": "online_dpo"},
        "scorer": {"train": [{"type": "reward_model", "model": str(model), "dtype": "bfloat16"}]},
        "learner": {"ranks": 8, "zero_stage": 3, "activation_checkpointing": True},
        "rollout": {"engines": 8, "memory_fraction": 0.5},
        "cluster": {"device": "gpu", "placement": "colocate"},
    }
    for name, value in sections.items():
        data[name] = {**data.get(name, {}), **value}
    config = load_config(data)
    algorithm, derived = check_settings(config)
    plan = Plan(config, algorithm, derived, base=model)
    return plan, actor_specs(config, critic=False, reference=True)


def test_shared_gpus_are_checked_for_each_side(model):
    """GPU 0 has an engine (40 GiB), learner rank 0 (32), the reference (19), the scorer (16)."""
    plan, specs = campaign(model)
    (tight,) = check_gpus(plan.needs(specs, 80 * GIB), 80 * GIB, colocate=True)
    assert (
        tight.startswith("a shared GPU needs about 77.")
        and "GiB while engines run, and there are 80.0" in tight
    )
    plan, specs = campaign(model, rollout={"memory_fraction": 0.6})
    with pytest.raises(
        PlacementError,
        match=r"about 8\d\.\d GiB while engines run, and there are 80\.0 \(rollout engine 0 48\.0",
    ):
        check_gpus(plan.needs(specs, 80 * GIB), 80 * GIB, colocate=True)
    plan, specs = campaign(model)
    with pytest.raises(PlacementError, match=r"new weights 15\.0"):
        check_gpus(plan.needs(specs, 80 * GIB), 80 * GIB, colocate=True, published=plan.weights())
    plan, specs = campaign(model, learner={"ranks": 3})
    with pytest.raises(PlacementError, match=r"while learners run, and there are 80\.0"):
        check_gpus(plan.needs(specs, 80 * GIB), 80 * GIB, colocate=True)


def test_host_memory_holds_what_sleeps(model):
    """18 bytes for each parameter of every sleeping learner, and the engines' weights."""
    plan, specs = campaign(model)
    needs = plan.needs(specs, 80 * GIB)
    learners = [need for need in needs if need.spec.role == "learner"]
    sleeping = sum(host_bytes(plan, need) for need in learners)
    assert sleeping > 18 * P
    total = sum(host_bytes(plan, need) for need in needs)
    assert total > sleeping + 8 * 2 * P

    def nodes(gib):
        resources = {"GPU": 8.0, "CPU": 64.0, "memory": 0.7 * gib * GIB}
        resources["object_store_memory"] = 0.3 * gib * GIB
        return [NodeResources(name="10.0.0.1", total=resources, free=resources)]

    assert check_hosts(plan, needs, nodes(total / GIB * 2)) == []
    (tight,) = check_hosts(plan, needs, nodes(total / GIB * 1.05))
    assert tight.startswith("10.0.0.1 needs about ")
    with pytest.raises(PlacementError, match=r"GiB of host memory .* expected placement separate"):
        check_hosts(plan, needs, nodes(total / GIB * 0.9))
    alone = {"device": "gpu", "placement": "separate"}
    plan, specs = campaign(model, cluster=alone, learner={"offload": True, "ranks": 1})
    (learner,) = [n for n in plan.needs(specs, 80 * GIB) if n.spec.role == "learner"]
    assert 16 * P < host_bytes(plan, learner) < 16.1 * P


def test_sync_sends_adapters_or_whole_weights(model):
    lora = {"lora": {"rank": 16}}
    plan, _ = campaign(model, policy=lora)
    assert (plan.weights(), plan.weights(whole=True), plan.moves) == (2 * 41_943_040, 2 * P, False)
    plan, _ = campaign(
        model,
        policy=lora,
        learner={"dtype": "float32"},
        algorithm={"reference": {"type": "previous", "every": 2}},
    )
    assert (plan.weights(), plan.moves) == (4 * 41_943_040, True)
    plan, _ = campaign(model)
    assert plan.weights() == plan.weights(whole=True) == 2 * P


def test_past_policies_take_memory_of_the_reference_and_disk(model):
    def planned(size):
        algorithm = {"type": "mnpo", "population": {"size": size}}
        plan, specs = campaign(model, algorithm=algorithm)
        (need,) = [n for n in plan.needs(specs, 80 * GIB) if n.spec.role == "reference"]
        return need.memory.total, plan.disk()

    alone, disk_alone = planned(0)
    two, disk_two = planned(2)
    four, disk_four = planned(4)
    assert two - alone == 2 * P and four == two  # one at a time, in bfloat16
    assert (disk_alone.past, disk_two.past, disk_four.past) == (0.0, 3 * 2 * P, 5 * 2 * P)
    assert disk_two.total - disk_alone.total == (disk_two.kept + 1) * disk_two.past


def test_actor_that_does_not_fit_a_gpu_or_its_share_is_refused(model):
    alone = {"device": "gpu", "placement": "separate"}
    plan, specs = campaign(model, cluster=alone, learner={"ranks": 1})
    with pytest.raises(
        PlacementError,
        match=r"learner rank 0 needs about 1\d\d\.\d GiB on a GPU, and there are 80.0 "
        r"\(weights 15.0, gra",
    ):
        check_gpus(plan.needs(specs, 80 * GIB), 80 * GIB, colocate=False)
    plan, specs = campaign(model, cluster={**alone, "gpus_per_scorer": 0.125})
    with pytest.raises(
        PlacementError,
        match=r"scorer needs about 16\.\d GiB on its share of a GPU, and there are 10\.0",
    ):
        check_gpus(plan.needs(specs, 80 * GIB), 80 * GIB, colocate=False)


def test_disk_without_room_for_a_checkpoint_is_refused(tmp_path):
    run = tmp_path / "runs" / "one"
    small = Disk(checkpoint=1e3, kept=1, policies=1e3, samples=1.0, iterations=1)
    assert "GiB free" in check_disk(small, run) and "too little" not in check_disk(small, run)
    assert "GiB too little in the end" in check_disk(
        Disk(checkpoint=1e3, kept=10**12, policies=1e3, samples=1.0, iterations=1), run
    )
    with pytest.raises(
        ConfigError,
        match=r"one checkpoint and the exported policy take about 931322\d+\.\d GiB, .* are free",
    ):
        check_disk(Disk(checkpoint=1e21, kept=1, policies=1e3, samples=1.0, iterations=1), run)


def test_seconds_of_an_iteration_from_stated_rates(model):
    plan, _ = campaign(model)
    seconds = seconds_per_iteration(plan.config, samples=512, engine_rate=1000.0, learner_rate=None)
    assert seconds == {"rollout": 512 * 1024 / (8 * 1000.0)}
    both = seconds_per_iteration(plan.config, samples=512, engine_rate=1000.0, learner_rate=500.0)
    assert both["learner"] == 512 * 1024 / (8 * 500.0)


def test_model_without_an_estimate_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "perceptron"}')
    with pytest.raises(ConfigError, match=r"policy\.model: .*no estimate from its config\.json"):
        read_shape(tmp_path, key="policy.model")

"""Whole campaigns with the real vLLM, DeepSpeed and Ray, on a tiny policy."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from campaign_runs import RAYHF, metrics, run, samples, start
from faults import committed
from safetensors.torch import load_file
from waiting import is_running, wait_until
from world import make_world, write_config

from launch.eval_target import find_target

pytestmark = pytest.mark.timeout(1200)  # generous: on a shared machine a start takes minutes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def first(world: Path) -> Path:
    """The config of a campaign that a signal ended after three iterations or more.

    With an EMA reference and offline wandb.
    """
    config = write_config(
        world,
        "first",
        run={"iterations": 5000, "keep_checkpoints": 5000},
        algorithm={
            "type": "online_dpo",
            "samples": 4,
            "pairs": "all_pairs",
            "reference": {"type": "ema", "alpha": 0.5, "every": 1},
        },
        trackers=[{"type": "wandb", "mode": "offline"}],
    )
    process = start(world, config)
    third = checkpoint(world, 3) / "MANIFEST.json"
    wait_until(lambda: third.exists() or process.poll() is not None, 400)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75 and "the same command continues" in err
    assert "processes ready, waiting for: " in out and "(building)" in out
    return config


def checkpoint(world: Path, iteration: int) -> Path:
    return world / f"first/checkpoints/iteration-{iteration:06d}"


def test_run_directory_and_metrics(world: Path, first: Path) -> None:
    """Equal bits for equal seeds are tested in test_faults.py and test_loop_runs.py."""
    second = metrics(world, "first")[2]
    expected = {
        "iteration", "policy/version", "rollout/tokens", "rollout/context_tokens",
        "rollout/length_mean", "rollout/truncated", "rollout/mismatch_kl", "scorer/reward_mean",
        "scorer/invalid", "reference/kl", "learner/loss", "learner/grad_norm", "pairs/kept",
        "pairs/ties", "eval/toy/sampled", "eval/toy/greedy", "staleness/max",
    }  # fmt: skip
    assert expected <= second.keys()
    assert second["policy/version"] == 2
    assert second["staleness/max"] == 0
    assert abs(second["rollout/mismatch_kl"]) < 1e-4
    assert second["rollout/mismatch_abs_max"] < 1e-3
    rows = samples(world, "first", 2)
    assert len({(r["prompt_id"], r["sample"]) for r in rows}) == len(rows) == 16
    assert all(len(r["token_ids"]) == len(r["logprobs"]) for r in rows)
    assert {r["policy_version"] for r in rows} == {1}
    command = [RAYHF, "export", "first", "exported"]
    exported = subprocess.run(command, cwd=world, capture_output=True, text=True, timeout=60)
    assert exported.returncode == 0, exported.stderr
    assert (world / "exported/tokenizer.json").exists()
    assert list((world / "first/wandb").glob("offline-run-*"))
    assert (checkpoint(world, 2) / "reference").is_dir()
    middle = find_target(str(world / "first@2"))
    assert (
        load_file(Path(middle.model.text) / "model.safetensors").keys()
        == load_file(world / "first/policy/model.safetensors").keys()
    )


def train(world: Path, name: str, **sections: object) -> dict[str, float]:
    """Run a campaign of two iterations; return its last metrics."""
    run(world, write_config(world, name, **sections))
    lines = metrics(world, name)
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert lines[-1]["policy/version"] == 2
    assert (world / name / "policy/config.json").exists()
    return lines[-1]


def test_ppo_trains_policy_and_critic(world: Path) -> None:
    last = train(
        world,
        "ppo",
        algorithm={"type": "ppo", "samples": 2},
        learner={"epochs": 2, "ranks": 2, "zero_stage": 2},
        cluster={"placement": "colocate"},
    )
    assert last["critic/loss"] > 0
    out, _ = run(world, world / "ppo.yaml")
    assert "nothing to do" in out


def test_grpo_trains_an_adapter_with_overlap_and_weights_in_flight(world: Path) -> None:
    algorithm = {"type": "grpo", "samples": 4, "kl": {"where": "loss", "estimator": "k3"}}
    last = train(
        world,
        "grpo",
        algorithm=algorithm,
        run={"max_staleness": 1},
        policy={"lora": {"rank": 4}, "dtype": "bfloat16"},
        rollout={"engines": 2, "in_flight_updates": True},
    )
    assert last["staleness/token_max"] <= 1


def test_hanging_rule_stops_the_run(world: Path) -> None:
    """Rules that raise or give no number stop a campaign in test_failure_budget.py."""
    scorer = {"train": [{"type": "rule", "function": "my_rules:hangs", "timeout_s": 1}]}
    # SimPO has no reference: one process less to start.
    without_reference = {"type": "online_dpo", "samples": 4, "loss": "simpo"}
    config = write_config(
        world, "hangs", scorer=scorer, prompts={"heldout": None}, algorithm=without_reference
    )
    _, err = run(world, config, code=9)
    assert err.startswith("rayhf: ") and err.count("\n") == 1 and "no response within 1 s" in err
    assert metrics(world, "hangs") == [{"iteration": 0, "policy/version": 0}]


def test_lost_actor_without_restarts_ends_the_run(world: Path, first: Path) -> None:
    """A stopped campaign continues; without restarts a lost engine ends it.

    Restarts are tested in test_faults.py.
    """
    last = committed(world / "first")
    before = metrics(world, "first")[: last + 1]
    process = start(world, first, "run.restarts=0")
    lines = world / "first/metrics.jsonl"
    # One iteration more than the signal may have left without a commit.
    more = len(before) + 2
    wait_until(lambda: lines.read_bytes().count(b"\n") >= more or process.poll() is not None, 400)
    children = psutil.Process(process.pid).children(recursive=True)
    victims = [c for c in children if "RolloutActor" in " ".join(c.cmdline())]
    assert len(victims) == 1, [c.cmdline() for c in children]
    os.kill(victims[0].pid, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 10, err
    assert "rollout engine 0 was lost" in err and err.count("\n") == 1
    assert f"continue: after iteration {last}, from iteration-{last:06d}" in out
    assert metrics(world, "first")[: last + 1] == before
    assert metrics(world, "first")[last + 1]["iteration"] == last + 1
    wait_until(lambda: not any(is_running(child.pid) for child in children))

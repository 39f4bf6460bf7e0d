"""Whole campaigns with the real engines, as a user starts them: vLLM, DeepSpeed and Ray, on a
policy of toy size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from world import make_world, write_config

pytestmark = pytest.mark.timeout(1200)  # generous: on a shared machine a start takes minutes
RAYHF = Path(sys.executable).with_name("rayhf")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def start(world: Path, config: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [RAYHF, "run", config, *overrides],
        cwd=world,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(world: Path, config: Path, *overrides: str, code: int = 0) -> tuple[str, str]:
    process = start(world, config, *overrides)
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, f"{out}\n{err}"
    return out, err


def metrics(world: Path, name: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (world / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def samples(world: Path, name: str, iteration: int) -> list[dict[str, object]]:
    return pq.read_table(world / name / f"samples/iteration-{iteration:06d}.parquet").to_pylist()


def wait_for(condition, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def first(world: Path) -> Path:
    """The config of a campaign that has played three rounds."""
    config = write_config(world, "first")
    said, _ = run(world, config, "run.iterations=3")
    assert "start: waiting for: " in said and "(building)" in said
    return config


def test_the_run_directory_and_its_metrics(world: Path, first: Path) -> None:
    """That equal seeds give equal bits is in test_faults.py (across kills, and where engines and
    learners take turns) and in test_loop_runs.py (however weights travel)."""
    last = metrics(world, "first")[-1]
    expected = {
        "iteration", "policy/version", "rollout/tokens", "rollout/context_tokens", "rollout/length_mean", "rollout/truncated",
        "rollout/mismatch_kl", "scorer/reward_mean", "scorer/invalid", "reference/kl", "learner/loss", "learner/grad_norm",
        "pairs/kept", "pairs/ties", "eval/toy/sampled", "eval/toy/greedy", "staleness/max",
    }  # fmt: skip
    assert expected <= last.keys()
    assert (
        last["staleness/max"] == 0
        and abs(last["rollout/mismatch_kl"]) < 1e-4
        and last["rollout/mismatch_abs_max"] < 1e-3
    )
    rows = samples(world, "first", 2)
    assert len({(r["prompt_id"], r["sample"]) for r in rows}) == len(rows) == 16
    assert all(len(r["token_ids"]) == len(r["logprobs"]) for r in rows) and {
        r["policy_version"] for r in rows
    } == {1}
    exported = subprocess.run(
        [RAYHF, "export", "first", "exported"],
        cwd=world,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert exported.returncode == 0 and (world / "exported/tokenizer.json").exists(), (
        exported.stderr
    )
    out, _ = run(world, first, "run.iterations=3")
    assert "nothing to do" in out


@pytest.mark.parametrize(
    ("name", "algorithm", "more"),
    [
        (
            "ppo",
            {"type": "ppo", "samples": 2},
            {
                "learner": {"epochs": 2, "ranks": 2, "zero_stage": 2},
                "cluster": {"placement": "colocate"},
            },
        ),
        (
            "grpo",
            {
                "type": "grpo",
                "samples": 4,
                "kl": {"where": "loss", "estimator": "k3"},
            },
            {
                "run": {"max_staleness": 1},
                "policy": {"lora": {"rank": 4}, "dtype": "bfloat16"},
                "rollout": {"engines": 2},
            },
        ),
    ],
)
def test_every_kind_of_loop_runs(
    world: Path, name: str, algorithm: dict[str, object], more: dict[str, object]
) -> None:
    run(world, write_config(world, name, algorithm=algorithm, **more))
    found = metrics(world, name)
    assert [m["iteration"] for m in found] == [0, 1, 2] and found[-1]["policy/version"] == 2
    assert (world / name / "policy/config.json").exists()
    if name == "ppo":
        assert "critic/loss" in found[-1] or "value/loss" in found[-1]


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("raises", "ValueError: no such answer"),
        ("hangs", "no answer within 1 s"),
        ("nan", "the rule returned nan"),
    ],
)
def test_a_rule_that_fails_stops_the_run_with_its_reason(
    world: Path, rule: str, reason: str
) -> None:
    scorer = {"train": [{"type": "rule", "function": f"my_rules:{rule}", "timeout_s": 1}]}
    without_reference = {
        "type": "online_dpo",
        "samples": 4,
        "loss": "simpo",
    }  # one process less to start
    config = write_config(
        world, rule, scorer=scorer, prompts={"heldout": None}, algorithm=without_reference
    )
    _, err = run(world, config, code=9)
    assert err.startswith("rayhf: ") and err.count("\n") == 1 and reason in err
    assert metrics(world, rule) == [{"iteration": 0, "policy/version": 0}]


def test_a_finished_campaign_goes_on_and_an_actor_that_may_not_be_replaced_is_named_and_leaves_nothing_behind(
    world: Path, first: Path
) -> None:
    """That it is replaced otherwise is in test_faults.py."""
    process = start(world, first, "run.iterations=5000", "run.restarts=0")
    lines = world / "first/metrics.jsonl"
    wait_for(lambda: lines.read_bytes().count(b"\n") > 4 or process.poll() is not None)
    children = psutil.Process(process.pid).children(recursive=True)
    victims = [c for c in children if "RolloutActor" in " ".join(c.cmdline())]
    assert len(victims) == 1, [c.cmdline() for c in children]
    os.kill(victims[0].pid, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert (
        process.returncode == 10 and "rollout engine 0 was lost" in err and err.count("\n") == 1
    ), err
    assert (
        "continue: after iteration 3, from iteration-000003" in out
        and metrics(world, "first")[4]["iteration"] == 4
    )
    wait_for(
        lambda: not [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE],
        30,
    )


def test_ctrl_c_exits_resumable(world: Path) -> None:
    """That it continues is in test_faults.py. Here with a reference that moves, and a mirror in
    wandb."""
    moving = {
        "type": "online_dpo",
        "samples": 3,
        "pairs": "all_pairs",
        "reference": {"type": "ema", "alpha": 0.5, "every": 1},
    }
    config = write_config(
        world, "stopped", algorithm=moving, trackers=[{"type": "wandb", "mode": "offline"}]
    )
    process = start(world, config, "run.iterations=500", "run.keep_checkpoints=500")
    second = world / "stopped/checkpoints/iteration-000002"
    wait_for(lambda: (second / "MANIFEST.json").exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75 and "the same command continues" in err
    assert list((world / "stopped/wandb").glob("offline-run-*")) and (second / "reference").is_dir()
    found = metrics(world, "stopped")
    assert found[2]["policy/version"] == 2 and (world / "stopped/policy/config.json").exists()

"""The further loops with the real engines, on a policy of toy size that ends its short answers:
what trains, and exact resume."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest
from campaign_runs import metrics, run, samples, start, wait_for
from world import make_world, teach_to_end, write_config

pytestmark = pytest.mark.timeout(1200)
RULES = """

def cycle(first, second, *, prompt, answer):
    kinds = [len(text) % 3 for text in (first, second)]
    return {0: 0.5, 1: 0.9, 2: 0.1}[(kinds[0] - kinds[1]) % 3]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_world(tmp_path_factory.mktemp("loops"))
    teach_to_end(directory)
    (directory / "my_rules.py").write_text((directory / "my_rules.py").read_text() + RULES)
    pairs = [
        {"prompt": f"Say something about {i}", "chosen": "a\na", "rejected": "bb"} for i in range(8)
    ]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return directory


SPAR = {
    "type": "spar",
    "samples": 3,
    "judge_votes": 3,
    "judge_temperature": 1.0,
    "refine_temperature": 1.0,
    "judge_template": "{{ instruction }} {{ response }}",
    "refine_template": "{{ instruction }} {{ response }} {{ judgement }}",
    "verdict_pattern": "([ab])",
    "verdict_yes": "a",
    "verdict_no": "b",
    "refined_pattern": None,
    "test_time_refine": True,
    "refiner": {"lr": 1e-3, "epochs": 1, "examples_per_step": 8},
}
MORE = {"prompts": {"batch": 8}, "learner": {"prompts_per_step": 8}}


def copy_as_a_kill_would_leave_it(
    process: subprocess.Popen[str], run_dir: Path, copy: Path
) -> None:
    """Of a campaign that goes on afterwards: nobody notices that everybody stood still for a
    moment."""
    top = psutil.Process(process.pid)
    family = [top, *top.children(recursive=True)]
    try:
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.suspend()
        shutil.copytree(run_dir, copy)
    finally:
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.resume()


def test_two_policies_are_trained_and_a_killed_run_ends_with_the_same_bits(world: Path) -> None:
    """The kill is one of everybody at once, as when the power fails; signals to one after the other
    are in test_faults.py.

    Nor does it change a bit how weights travel: after the kill by broadcast, before it and in the
    other run by the object store.
    """
    calm = start(world, write_config(world, "first", algorithm=SPAR, **MORE), "run.iterations=3")
    wait_for(
        lambda: (
            (world / "first/checkpoints/iteration-000001/MANIFEST.json").exists()
            or calm.poll() is not None
        )
    )
    copy_as_a_kill_would_leave_it(calm, world / "first", world / "second")
    _, said = calm.communicate(timeout=400)
    assert calm.returncode == 0, said
    config = write_config(
        world, "second", algorithm=SPAR, cluster={"transport": "broadcast"}, **MORE
    )
    assert len(metrics(world, "second")) < 4, "it was over before it was killed"
    out, _ = run(world, config, "run.iterations=3")
    assert (
        "continue: after round" in out
        and "transport: broadcast" in (world / "second/config.yaml").read_text()
    )
    assert metrics(world, "first") == metrics(world, "second")
    for iteration in (1, 2, 3):
        assert samples(world, "first", iteration) == samples(world, "second", iteration)
    for policy in ("policy", "refiner"):
        weights = [
            (world / name / policy / "model.safetensors").read_bytes()
            for name in ("first", "second")
        ]
        assert weights[0] == weights[1] != (world / "policy/model.safetensors").read_bytes()
    last = metrics(world, "first")[-1]
    assert last["policy/version"] >= 1 and last["refiner/version"] >= 1 and "refiner/loss" in last
    assert "eval/toy/refined" in last and last["pairs/kept"] >= 0
    kinds = {row["kind"] for row in samples(world, "first", 1)}
    assert {"answer", "judgement", "refinement"} <= kinds


@pytest.mark.parametrize(
    ("name", "algorithm", "scorer"),
    [
        ("mcts", {"type": "mcts_dpo", "width": [3, 2], "iterations": 4, "parallel": 2}, None),
        (
            "sppo",
            {"type": "sppo", "samples": 4, "eta": 2.0},
            {"train": [{"type": "pairwise_rule", "function": "my_rules:cycle"}]},
        ),
        ("hypo", {"type": "hypo", "offline": {"path": "pairs.jsonl"}}, None),
    ],
)
def test_every_further_loop_trains(
    world: Path, name: str, algorithm: dict[str, object], scorer: dict[str, object] | None
) -> None:
    more: dict[str, object] = {
        "prompts": {"batch": 8},
        "run": {"max_staleness": 1 if name == "mcts" else 0},
    }
    if scorer:
        more["scorer"] = {**scorer, "evaluate": [{"type": "rule", "function": "my_rules:even"}]}
    run(world, write_config(world, name, algorithm=algorithm, **more))
    last = metrics(world, name)[-1]
    assert last["iteration"] == 2 and last["policy/version"] >= 1
    assert last["staleness/max"] > 0 or abs(last["rollout/mismatch_kl"]) < 1e-4
    rows = samples(world, name, 1)
    if name == "mcts":
        assert {row["kind"] for row in rows} >= {"step"} and any(
            row["parent"] is not None for row in rows
        )
    if name == "sppo":
        assert all(len(row["wins"]) == 4 for row in rows) and "reference/kl" in last
    if name == "hypo":
        assert last["pairs/given"] == 8 and last["hypo/dpo_accuracy"] >= 0.0

"""Search, self-play and hybrid loops with the real engines: what they train, and exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from campaign_runs import copy_as_if_killed, metrics, run, samples, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from waiting import wait_until
from world import make_world, teach_to_end, write_config

from rayhf.run_dir.tables import read_evaluations

pytestmark = pytest.mark.timeout(1200)
CYCLE = """

def cycle(first, second, *, prompt, reference_answer):
    shapes = [len(text) % 3 for text in (first, second)]
    return {0: 0.5, 1: 0.9, 2: 0.1}[(shapes[0] - shapes[1]) % 3]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_world(tmp_path_factory.mktemp("loops"))
    teach_to_end(directory)
    with (directory / "my_rules.py").open("a") as rules:
        rules.write(CYCLE)
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
BATCH = {"prompts": {"batch": 8}, "learner": {"prompts_per_step": 8}}
WATCHED: dict[str, Any] = {
    "evaluations": {
        "wins": {
            "type": "win_rate",
            "against": "initial",
            "scorer": [{"type": "pairwise_rule", "function": "my_rules:cycle"}],
            "prompts": "train.jsonl",
            "every": 1,
        }
    },
    "trackers": [{"type": "tensorboard"}],
}


def test_two_policies_resume_with_the_same_bits(world: Path) -> None:
    """All processes are killed at once; test_faults.py kills one after the other.

    The transport of weights changes no bit either: broadcast after the kill, the object store
    before it and in the other run. The win rate is against the start's answers, which the resumed
    run has from its checkpoint only.
    """
    # Large steps: the answers must differ from those at the start.
    learner = {**BATCH["learner"], "lr": 5e-3}
    sections: dict[str, Any] = {**BATCH, **WATCHED, "algorithm": SPAR, "learner": learner}
    config = write_config(world, "first", **sections)
    process = start(world, config, "run.iterations=3")
    manifest = world / "first/checkpoints/iteration-000001/MANIFEST.json"
    wait_until(lambda: manifest.exists() or process.poll() is not None, 400)
    copy_as_if_killed(process, world / "first", world / "second")
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    config = write_config(world, "second", cluster={"transport": "broadcast"}, **sections)
    assert len(metrics(world, "second")) < 4, "it had finished before it was killed"
    out, _ = run(world, config, "run.iterations=3")
    assert "continue: after iteration" in out
    assert "transport: broadcast" in (world / "second/config.yaml").read_text()
    assert metrics(world, "first") == metrics(world, "second")
    for iteration in (1, 2, 3):
        assert samples(world, "first", iteration) == samples(world, "second", iteration)
    for policy in ("policy", "refiner"):
        weights = [
            (world / name / policy / "model.safetensors").read_bytes()
            for name in ("first", "second")
        ]
        assert weights[0] == weights[1] != (world / "policy/model.safetensors").read_bytes()
    check_win_rates(world)
    last = metrics(world, "first")[-1]
    assert last["policy/version"] >= 1
    assert last["refiner/version"] >= 1
    assert {"refiner/loss", "eval/toy/refined", "pairs/kept"} <= last.keys()
    assert sum(line.get("pairs/kept", 0) for line in metrics(world, "first")) > 0
    kinds = {row["kind"] for row in samples(world, "first", 1)}
    assert {"answer", "judgement", "refinement"} <= kinds


def check_win_rates(world: Path) -> None:
    """The win rates of every iteration have intervals, values by prompt and points in
    TensorBoard, the same ones in both runs."""
    lines = metrics(world, "first")[1:]
    for line in lines:
        low, rate, high = (line[f"eval/wins/win_rate{end}"] for end in ("_low", "", "_high"))
        assert 0 <= low <= rate <= high <= 1
    assert lines[-1]["eval/wins/ties"] < 1, "the policy answers as at the start"
    for name in ("first", "second"):
        events = EventAccumulator(str(world / name / "tensorboard"))
        events.Reload()
        points = {event.step: event.value for event in events.Scalars("eval/wins/win_rate")}
        assert points == pytest.approx({n: x["eval/wins/win_rate"] for n, x in enumerate(lines, 1)})
        for number, line in enumerate(lines, 1):
            file = f"evaluations/iteration-{number:06d}.parquet"
            assert (world / "first" / file).read_bytes() == (world / name / file).read_bytes()
            wins = read_evaluations(world / name / file)["eval/wins/win_rate"]
            assert wins.values_P.mean() == pytest.approx(line["eval/wins/win_rate"])


def train(world: Path, name: str, **sections: object) -> dict[str, float]:
    """Run a campaign of two iterations; return its last metrics."""
    config = write_config(world, name, **{"prompts": {"batch": 8}, **sections})
    run(world, config)
    last = metrics(world, name)[-1]
    assert last["iteration"] == 2
    assert last["policy/version"] >= 1
    return last


def test_mcts_dpo_trains(world: Path) -> None:
    algorithm = {"type": "mcts_dpo", "width": [3, 2], "iterations": 4, "parallel": 2}
    last = train(world, "mcts", algorithm=algorithm, run={"max_staleness": 1})
    assert last["staleness/max"] == 1
    rows = samples(world, "mcts", 1)
    assert "step" in {row["kind"] for row in rows}
    assert any(row["parent"] is not None for row in rows)


def test_sppo_trains(world: Path) -> None:
    scorer = {
        "train": [{"type": "pairwise_rule", "function": "my_rules:cycle"}],
        "evaluate": [{"type": "rule", "function": "my_rules:even"}],
    }
    algorithm = {"type": "sppo", "samples": 4, "eta": 2.0}
    last = train(world, "sppo", algorithm=algorithm, scorer=scorer)
    assert abs(last["rollout/mismatch_kl"]) < 1e-4
    assert "reference/kl" in last
    assert all(len(row["wins"]) == 4 for row in samples(world, "sppo", 1))


def test_xpo_trains_with_engines_of_the_initial_policy(world: Path) -> None:
    last = train(world, "xpo", algorithm={"type": "xpo"})
    assert abs(last["rollout/mismatch_kl"]) < 1e-4 and last["staleness/max"] == 0
    assert last["initial/version"] == 0
    rows = samples(world, "xpo", 2)
    assert [row["kind"] for row in rows].count("initial") == len(rows) // 2 == 8
    assert all(row["policy_version"] == 0 for row in rows if row["kind"] == "initial")


def test_hypo_trains(world: Path) -> None:
    last = train(world, "hypo", algorithm={"type": "hypo", "offline": {"path": "pairs.jsonl"}})
    assert abs(last["rollout/mismatch_kl"]) < 1e-4
    assert last["pairs/given"] == 8
    assert last["hypo/dpo_accuracy"] > 0.5

"""Stages with the real learner and no engine: exact resume, and a stage from another's policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from campaign_runs import metrics, run
from world import make_world

pytestmark = pytest.mark.timeout(600)
LINES = [f"Say something about {i}" for i in range(8)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_world(tmp_path_factory.mktemp("stages"))
    talks = [
        [
            {"role": "user", "content": line},
            {"role": "assistant", "content": "please " * (i % 3)},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "please!"},
        ]
        for i, line in enumerate(LINES)
    ]
    write(directory / "talks.jsonl", [{"messages": talk} for talk in talks])
    pairs = [{"prompt": line, "chosen": "please", "rejected": "0123456789"} for line in LINES]
    write(directory / "pairs.jsonl", pairs)
    return directory


def write(file: Path, rows: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(world: Path, name: str, **sections: object) -> Path:
    """A campaign without engines and scorers, as JSON, which is YAML."""
    data = {
        "run": {"dir": name, "iterations": 4, "eval_every": 2, "checkpoint_every": 2},
        "policy": {"model": "policy", "dtype": "float32", "max_length": 128},
        "learner": {"lr": 1e-3, "dtype": "float32", "zero_stage": 0, "threads": 1},
        **sections,
    }
    file = world / f"{name}.yaml"
    file.write_text(json.dumps(data))
    return file


def test_sft_resumes_with_the_same_bits_and_kto_starts_from_its_policy(world: Path) -> None:
    sft = {
        "algorithm": {"type": "sft"},
        "prompts": {"train": "talks.jsonl", "batch": 4},
        "evaluations": {"val": {"type": "validation_loss", "prompts": "talks.jsonl"}},
    }
    run(world, config(world, "whole", **sft))
    stopped = config(world, "stopped", **sft)
    run(world, stopped, "run.iterations=2")
    out, _ = run(world, stopped)
    assert "continue: after iteration 2" in out
    whole, resumed = (metrics(world, name) for name in ("whole", "stopped"))
    # The last iteration of the first attempt was evaluated, which changes nothing.
    assert resumed == whole
    weights = [(world / n / "policy/model.safetensors").read_bytes() for n in ("whole", "stopped")]
    assert weights[0] == weights[1]
    assert whole[-1]["eval/val/nll"] < whole[0]["eval/val/nll"] - 0.1
    # Two turns of each of four conversations, each with its end.
    assert whole[1]["sft/tokens"] > 8

    kto = {
        "policy": {"model": "whole/policy", "dtype": "float32", "max_length": 128},
        "algorithm": {"type": "kto"},
        "prompts": {"train": "pairs.jsonl", "batch": 8},
        "evaluations": {"pairs": {"type": "pair_accuracy", "prompts": "pairs.jsonl"}},
    }
    run(world, config(world, "kto", **kto))
    last = metrics(world, "kto")[-1]
    assert last["eval/pairs/pair_accuracy"] == 1
    assert last["eval/pairs/pair_margin"] > 0
    assert last["kto/margin"] > 0

"""Inputs of a campaign small enough for tests: a tiny random policy, prompts, rules, a config."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from rayhf.tiny.language_model import ModelSize, Phase, new_model, train
from rayhf.tiny.tokenizer import POLICY_FORMAT, train_tokenizer

SIZE = ModelSize(hidden=64, layers=2, intermediate=96)
RULE = """
import time

def even(completion, *, prompt, reference_answer, finish_reason):
    return sum(ord(c) % 2 == 0 for c in completion) / max(len(completion), 1)

def hangs(completion, *, prompt, reference_answer, finish_reason):
    time.sleep(3600)

def slow(completion, *, prompt, reference_answer, finish_reason):
    time.sleep(0.1)
    return 1.0

def quick(completion, *, prompt, reference_answer, finish_reason):
    return 1.0
"""


def make_world(directory: Path) -> Path:
    """Write policy/, train.jsonl, heldout.jsonl and my_rules.py into `directory`."""
    tokenizer = train_tokenizer(
        ["Say something about 0123456789, please!"] * 4,
        POLICY_FORMAT,
        max_vocab=300,
        max_length=128,
    )
    model = new_model(SIZE, tokenizer, seed=0)
    model.save_pretrained(directory / "policy")
    tokenizer.save_pretrained(directory / "policy")
    for name, start, count in (("train", 0, 24), ("heldout", 100, 6)):
        rows = [
            json.dumps({"prompt": f"Say something about {i}", "answer": str(i)})
            for i in range(start, start + count)
        ]
        (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    (directory / "my_rules.py").write_text(RULE)
    return directory


def teach_to_end(world: Path) -> None:
    """Train the policy to write a few lines of a and b and then to stop.

    Search trees then have leaves, and lines are steps.
    """
    rng = random.Random(0)
    answers = [
        "\n".join(rng.choice("ab") * rng.randint(1, 2) for _ in range(rng.randint(1, 2)))
        for _ in range(300)
    ]
    questions = [f"Say something about {rng.randint(0, 200)}" for _ in answers]
    tokenizer = train_tokenizer(
        [*questions, *answers], POLICY_FORMAT, max_vocab=300, max_length=128
    )
    policy = new_model(SIZE, tokenizer, seed=0)
    train(
        policy,
        tokenizer,
        list(zip(questions, answers, strict=True)),
        Phase(steps=80, batch=16, lr=5e-3, lr_end=1e-3),
        seed=0,
        progress=lambda done: None,
    )
    policy.save_pretrained(world / "policy")
    tokenizer.save_pretrained(world / "policy")


def config(directory: str, /, **sections: Any) -> dict[str, Any]:
    """Return a complete config with relative paths.

    `sections` are merged in; a section with a `type` is replaced.
    """
    data: dict[str, Any] = {
        "seed": 5,
        "run": {"dir": directory, "iterations": 2, "eval_every": 2, "checkpoint_every": 1},
        "policy": {"model": "policy", "dtype": "float32", "max_length": 128},
        "prompts": {"train": "train.jsonl", "heldout": "heldout.jsonl", "task": "toy", "batch": 4},
        "algorithm": {"type": "online_dpo", "samples": 4},
        "rollout": {"max_tokens": 12, "kv_cache_gib": 0.1, "threads": 1},
        "scorer": {"train": [{"type": "rule", "function": "my_rules:even"}]},
        "learner": {
            "lr": 1e-3,
            "dtype": "float32",
            "zero_stage": 0,
            "token_budget": 2048,
            "threads": 1,
        },
        "reference": {"threads": 1},
    }
    for name, value in sections.items():
        replace = name not in data or not isinstance(value, dict) or "type" in value
        data[name] = value if replace else {**data[name], **value}
    return data


def write_config(world: Path, name: str, /, **sections: Any) -> Path:
    """Write NAME.yaml with run directory NAME into `world`."""
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config(name, **sections)))
    return path

"""A campaign small enough for tests: a random policy of a few thousand parameters, prompts, and a config around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from rayhf.tiny.language_model import ModelSize, new_model
from rayhf.tiny.tokenizer import POLICY_FORMAT, train_tokenizer

SIZE = ModelSize(hidden=64, layers=2, intermediate=96)
RULE = """
import time

def even(completion, *, prompt, answer, finish_reason):
    return sum(ord(c) % 2 == 0 for c in completion) / max(len(completion), 1)

def hangs(completion, *, prompt, answer, finish_reason):
    time.sleep(3600)

def slow(completion, *, prompt, answer, finish_reason):
    time.sleep(0.1)
    return 1.0
"""


def make_world(directory: Path) -> Path:
    """policy/, train.jsonl, heldout.jsonl and my_rules.py in `directory`."""
    tokenizer = train_tokenizer(["Say something about 0123456789, please!"] * 4, POLICY_FORMAT, max_vocab=300, max_length=128)
    model = new_model(SIZE, tokenizer, seed=0)
    model.save_pretrained(directory / "policy")
    tokenizer.save_pretrained(directory / "policy")
    for name, start, count in (("train", 0, 24), ("heldout", 100, 6)):
        rows = [json.dumps({"prompt": f"Say something about {i}", "answer": str(i)}) for i in range(start, start + count)]
        (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    (directory / "my_rules.py").write_text(RULE)
    return directory


def config(directory: str, /, **sections: Any) -> dict[str, Any]:
    """A complete config with relative paths; `sections` are merged in, those with a type replaced."""
    data: dict[str, Any] = {
        "seed": 5,
        "run": {"dir": directory, "iterations": 2, "eval_every": 2, "checkpoint_every": 1},
        "policy": {"model": "policy", "dtype": "float32", "max_length": 128},
        "prompts": {"train": "train.jsonl", "heldout": "heldout.jsonl", "task": "toy", "batch": 4},
        "algorithm": {"type": "online_dpo", "samples": 4},
        "rollout": {"max_tokens": 12, "kv_cache_gib": 0.1, "threads": 1},
        "scorer": {"train": [{"type": "rule", "function": "my_rules:even"}]},
        "learner": {"lr": 1e-3, "dtype": "float32", "zero_stage": 0, "token_budget": 2048, "threads": 1},
        "reference": {"threads": 1},
    }
    for name, value in sections.items():
        whole = name not in data or not isinstance(value, dict) or "type" in value
        data[name] = value if whole else {**data[name], **value}
    return data


def write_config(world: Path, name: str, /, **sections: Any) -> Path:
    """World/NAME.yaml with run directory NAME."""
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config(name, **sections)))
    return path

"""`rayhf eval` with models and suites of a hub: tests/hub.py, in the form of the public ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from taught_reward_model import make_reward_model

from rayhf.tiny import build
from tests.hub import Hub, hub_server

ROOT = Path(__file__).parents[2]
DIRECTORY = Path(os.environ.get("RAYHF_TINY_DIR") or ROOT / ".tiny")
RAYHF = Path(sys.executable).with_name("rayhf")


SETTINGS = """
rollout: {max_tokens: 48}
samples: 2
suites:
  gsm8k: {limit: 4, type: gsm8k}
  math: {type: math}
  ifeval: {type: ifeval}
"""


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def card(config: str, split: str) -> str:
    data = f"data_files: [{{split: {split}, path: data.jsonl}}]"
    return f"---\nconfigs:\n- {{config_name: {config}, {data}}}\n---\n"


def add_suites(hub: Hub) -> None:
    """Add data sets with the names, configurations, splits and columns of the public ones."""
    sums = [
        {"question": f"What is {n}+3?", "answer": f"{n} and 3.\n#### {n + 3}"} for n in range(6)
    ]
    instructions = [
        {
            "key": n,
            "prompt": f"What is {n}+3?",
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            "kwargs": [
                {"relation": None, "num_words": None},
                {"relation": "at least", "num_words": 500},
            ],
        }
        for n in range(3)
    ]
    pairs = [
        {"id": n, "prompt": "Say something.", "chosen": "sea", "rejected": "a", "subset": subset}
        for n, subset in enumerate(("alpacaeval-easy", "hep-cpp", "hep-cpp"))
    ]
    problems = [{"problem": "What is $1+1$?", "solution": "", "answer": "2", "level": 1}]
    for name, config, split, rows in (
        ("HuggingFaceH4/MATH-500", "default", "test", problems),
        ("openai/gsm8k", "main", "test", sums),
        ("google/IFEval", "default", "train", instructions),
        ("allenai/reward-bench", "default", "filtered", pairs),
    ):
        hub.add("dataset", name, {"README.md": card(config, split), "data.jsonl": lines(*rows)})


def evaluate(hub: Hub, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the command in `folder`; return its results by suite."""
    done = subprocess.run(
        [RAYHF, "eval", *arguments],
        cwd=folder,
        env=os.environ | hub.env(folder / "home"),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(file.read_text()) for file in (folder / "evals").glob("*.json")]
    return {each["suite"]: each for each in results}


def test_suites_and_models_of_a_hub(tmp_path: Path) -> None:
    policy = build(DIRECTORY, tasks=["arithmetic"])["arithmetic"].policy
    reward_model, _ = make_reward_model(tmp_path)
    with hub_server(tmp_path / "hub") as hub:
        add_suites(hub)
        commit = hub.add("model", "org/policy", policy)
        hub.add("model", "org/reward-model", reward_model)
        (tmp_path / "eval.yaml").write_text(SETTINGS)
        evaluate(hub, tmp_path, "org/policy", "--config", "eval.yaml", "policy.dtype=float32")
        results = evaluate(
            hub, tmp_path, "org/reward-model", "--suite", "rewardbench", "policy.dtype=float32"
        )
    assert results["gsm8k"]["resolved_model"] == f"org/policy@{commit}"
    sums = results["gsm8k"]["metrics"]
    assert sums["strict_match/mean@2"]["count"] == sums["flexible_extract/mean@2"]["count"] == 4
    # The policy ends with the sum, but not in the form that strict_match wants.
    assert sums["strict_match/mean@2"]["value"] == 0 <= sums["flexible_extract/mean@2"]["value"]
    assert results["math"]["metrics"]["math_verify/mean@2"]["count"] == 1
    followed = results["ifeval"]["metrics"]
    assert followed["prompt_strict/mean@2"]["value"] == 0  # nothing has 500 words
    assert followed["instruction_strict/mean@2"]["value"] == 0.5
    assert results["rewardbench"]["pairs"] == 3
    assert set(results["rewardbench"]["metrics"]["section"]) >= {"Chat", "Reasoning"}

"""The tiny world, built by its recipes.

It is built in $RAYHF_TINY_DIR, or in .tiny at the top of the repository, and kept for later runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rayhf.rollout.env import engine_env
from rayhf.tiny import TASKS, TaskInfo, build, words
from rayhf.tiny.reward_model import score

pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).parents[2]
DIRECTORY = Path(os.environ.get("RAYHF_TINY_DIR") or ROOT / ".tiny")
BUILT = tuple(task for task in TASKS if task != "challenges")
"""Tasks that `make test` builds: no other test needs challenges, which takes minutes."""


@pytest.fixture(scope="module")
def tiny() -> dict[str, TaskInfo]:
    """Build with the command, in a new process: other tests have set this one to one thread."""
    ours = engine_env("cpu", 1)
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment["OMP_WAIT_POLICY"] = "passive"  # the other tests need the cores too
    rayhf = Path(sys.executable).with_name("rayhf")
    done = subprocess.run(
        [rayhf, "tiny", DIRECTORY, *(word for task in BUILT for word in ("--task", task))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    assert all(task in done.stdout for task in BUILT)
    return build(DIRECTORY, tasks=BUILT)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_second_build_reuses_the_first(tiny: dict[str, TaskInfo]) -> None:
    again = build(DIRECTORY, tasks=BUILT)
    assert all(info.cached for info in again.values())
    assert {task: info.measured for task, info in again.items()} == {
        task: info.measured for task, info in tiny.items()
    }


def test_policies_are_mediocre_and_better_when_greedy(tiny: dict[str, TaskInfo]) -> None:
    measured = tiny["arithmetic"].measured
    assert 0.30 <= measured["accuracy_sampled"] <= 0.60
    assert measured["accuracy_greedy"] >= measured["accuracy_sampled"] + 0.25
    assert 1.0 < tiny["words"].measured["true_preference_sampled"] < 3.5


def test_reward_model_has_learned_the_preference(tiny: dict[str, TaskInfo]) -> None:
    measured = tiny["words"].measured
    assert measured["reward_accuracy_true"] > 0.7
    assert measured["reward_accuracy_labels"] > 0.62
    assert 0.7 < measured["labels_agree_with_true_preference"] < 0.9


def test_instruction_policy_acts_judges_and_refines_moderately(
    tiny: dict[str, TaskInfo],
) -> None:
    info = tiny["instructions"]
    measured = info.measured
    assert 0.25 <= measured["satisfied_sampled"] <= 0.60
    assert 0.60 <= measured["judge_accuracy_sampled"] <= 0.90
    assert measured["judge_accuracy_voted"] >= measured["judge_accuracy_sampled"] + 0.05
    assert measured["refine_success"] >= measured["satisfied_sampled"] + 0.05
    judgements = rows(info.directory / "heldout_judgements.jsonl")
    assert sum(row["answer"] == "yes" for row in judgements) == len(judgements) // 2 == 250


@pytest.mark.slow
def test_challenges_policy_asks_and_solves_moderately() -> None:
    info = build(DIRECTORY, tasks=["challenges"])["challenges"]
    assert (len(rows(info.train)), len(rows(info.heldout))) >= (126, 250)
    measured = info.measured
    assert measured["questions_valid"] > 0.85 and 1.2 < measured["questions_steps"] < 2.5
    assert 0.1 <= measured["accuracy_sampled"] <= 0.4
    assert measured["accuracy_greedy"] >= measured["accuracy_sampled"] + 0.2


def test_train_and_heldout_prompts_do_not_overlap(tiny: dict[str, TaskInfo]) -> None:
    for info in tiny.values():
        train = rows(info.train)
        heldout = rows(info.heldout)
        prompts = [row["prompt"] for row in train + heldout]
        # The game is learned from play, not from a variety of prompts.
        enough = (600, 120) if info.task == "game" else (2000, 500)
        assert (len(train), len(heldout)) >= enough and len(heldout) >= enough[1]
        assert len(set(prompts)) == len(prompts)
        assert all(("answer" in row) == (info.task == "arithmetic") for row in train + heldout)


@pytest.mark.parametrize("task", ["arithmetic", "words", "instructions"])
def test_policy_is_loadable_by_transformers_and_vllm(tiny: dict[str, TaskInfo], task: str) -> None:
    info = tiny[task]
    model = AutoModelForCausalLM.from_pretrained(info.policy)
    tokenizer = AutoTokenizer.from_pretrained(info.policy)
    assert 0.2e6 < model.num_parameters() == info.sizes["policy_parameters"] < 2e6
    assert str(model.dtype) == "torch.float32"
    assert model.config.max_position_embeddings == 512
    assert model.config.hidden_size // model.config.num_attention_heads == 32
    assert (model.config.eos_token_id, model.config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)
    chat = [{"role": "user", "content": rows(info.train)[0]["prompt"]}]
    assert len(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]) < 32


def test_reward_model_judges_with_its_own_tokenizer(tiny: dict[str, TaskInfo]) -> None:
    info = tiny["words"]
    assert info.reward_model is not None
    model = AutoModelForSequenceClassification.from_pretrained(info.reward_model)
    tokenizer = AutoTokenizer.from_pretrained(info.reward_model)
    assert model.config.num_labels == 1
    assert tokenizer.get_vocab() != AutoTokenizer.from_pretrained(info.policy).get_vocab()
    assert len(rows(info.directory / "pairs_train.jsonl")) == 5000
    pairs = rows(info.directory / "pairs_test.jsonl")
    assert len(pairs) == 500
    prompts = [pair["prompt"] for pair in pairs]
    chosen = score(model, tokenizer, prompts, [pair["chosen"] for pair in pairs])
    rejected = score(model, tokenizer, prompts, [pair["rejected"] for pair in pairs])
    right = sum(good > bad for good, bad in zip(chosen, rejected, strict=True)) / len(pairs)
    assert right == pytest.approx(info.measured["reward_accuracy_labels"], abs=0.01)
    prompt = "Words about sea, night and garden."
    good = "cold wave bright star wild rose"
    bad = "barn barn barn goat goat goat"
    assert (
        words.true_preference(good, prompt=prompt, reference_answer=None, finish_reason="stop") > 3
    )
    better, worse = score(model, tokenizer, [prompt, prompt], [good, bad])
    assert better > worse


def test_notebook_runs(tiny: dict[str, TaskInfo], tmp_path: Path) -> None:
    """The notebook of the documentation, in a folder that has what a clone has."""
    (tmp_path / ".tiny").symlink_to(DIRECTORY)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    notebook = nbformat.read(ROOT / "docs/notebooks/first_run.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "model.safetensors" in printed
    assert len((tmp_path / "runs/notebook/metrics.jsonl").read_text().splitlines()) == 3

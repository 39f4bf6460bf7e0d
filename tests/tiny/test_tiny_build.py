"""The tiny world, built by its recipes.

Two tasks are built as users build them, in $RAYHF_TINY_DIR or in .tiny at the top of the
repository, and kept for later runs. The recipes of the others take minutes, and no other test needs
what they make: here they are run with smaller models and fewer steps. `make learn`, whose figures
depend on them, repeats the tests with all tasks as they are.
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
from rayhf.tiny import TASKS, TaskInfo, build, instructions_world, words, words_world
from rayhf.tiny.language_model import ModelSize, Phase
from rayhf.tiny.reward_model import score

pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).parents[2]
DIRECTORY = Path(os.environ.get("RAYHF_TINY_DIR") or ROOT / ".tiny")
BUILT = ("arithmetic", "game")
"""Tasks that `make test` builds as they are."""
OTHERS = ("words", "instructions")
"""Tasks of which `make test` builds a small version."""
SMALL: dict[Any, dict[str, Any]] = {
    words_world: {
        "HELDOUT": 100,
        "TRAIN": 500,
        "PAIRS_TRAIN": 1000,
        "PAIRS_TEST": 100,
        "DEMONSTRATIONS": 4000,
        "SIZE": ModelSize(hidden=96, layers=2, intermediate=256),
        "CLEAN": Phase(steps=200, batch=32, lr=4e-3, lr_end=1e-3),
        "MEDIOCRE": Phase(steps=60, batch=32, lr=1e-3, lr_end=1e-4),
        "REWARD": Phase(steps=90, batch=32, lr=3e-3, lr_end=3e-4),
    },
    instructions_world: {
        "HELDOUT": 40,
        "TRAIN": 200,
        "DEMONSTRATED": 400,
        "SIZE": ModelSize(hidden=96, layers=2, intermediate=256),
        "JUDGING": Phase(steps=60, batch=16, lr=3e-3, lr_end=2e-3),
        "CLEAN": Phase(steps=60, batch=16, lr=3e-3, lr_end=1e-3),
        "SLIPPING": Phase(steps=20, batch=16, lr=1e-3, lr_end=1e-4),
    },
}
"""Constants of the recipes that take minutes, for models that learn enough to be measured."""


def build_with_command(tasks: tuple[str, ...]) -> dict[str, TaskInfo]:
    """Build in a new process: other tests have set this one to one thread."""
    ours = engine_env("cpu", 1)
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment["OMP_WAIT_POLICY"] = "passive"  # the other tests need the cores too
    rayhf = Path(sys.executable).with_name("rayhf")
    done = subprocess.run(
        [rayhf, "tiny", DIRECTORY, *(word for task in tasks for word in ("--task", task))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    assert all(task in done.stdout for task in tasks)
    return build(DIRECTORY, tasks=tasks)


@pytest.fixture(scope="module")
def tiny() -> dict[str, TaskInfo]:
    return build_with_command(BUILT)


@pytest.fixture(scope="module")
def whole() -> dict[str, TaskInfo]:
    return build_with_command(TASKS)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TaskInfo]:
    with pytest.MonkeyPatch.context() as patch:
        for recipe, constants in SMALL.items():
            for name, value in constants.items():
                patch.setattr(recipe, name, value)
        return build(tmp_path_factory.mktemp("small"), tasks=OTHERS)


@pytest.fixture(scope="module", params=["small", pytest.param("whole", marks=pytest.mark.slow)])
def other(request: pytest.FixtureRequest) -> dict[str, TaskInfo]:
    """The tasks that `make test` builds from smaller recipes."""
    built: dict[str, TaskInfo] = request.getfixturevalue(request.param)
    return {task: built[task] for task in OTHERS}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_second_build_reuses_the_first(tiny: dict[str, TaskInfo]) -> None:
    again = build(DIRECTORY, tasks=BUILT)
    assert all(info.cached for info in again.values())
    assert {task: info.measured for task, info in again.items()} == {
        task: info.measured for task, info in tiny.items()
    }


def test_policy_is_mediocre_and_better_when_greedy(tiny: dict[str, TaskInfo]) -> None:
    measured = tiny["arithmetic"].measured
    assert 0.30 <= measured["accuracy_sampled"] <= 0.60
    assert measured["accuracy_greedy"] >= measured["accuracy_sampled"] + 0.25


def test_words_policy_is_mediocre(other: dict[str, TaskInfo]) -> None:
    assert 1.0 < other["words"].measured["true_preference_sampled"] < 3.5


@pytest.mark.slow
def test_reward_model_has_learned_the_preference(whole: dict[str, TaskInfo]) -> None:
    measured = whole["words"].measured
    assert measured["reward_accuracy_true"] > 0.7
    assert measured["reward_accuracy_labels"] > 0.62


def test_small_reward_model_learns_the_preference(small: dict[str, TaskInfo]) -> None:
    assert small["words"].measured["reward_accuracy_true"] > 0.65


def test_labels_mostly_agree_with_the_true_preference(other: dict[str, TaskInfo]) -> None:
    assert 0.7 < other["words"].measured["labels_agree_with_true_preference"] < 0.9


@pytest.mark.slow
def test_instruction_policy_acts_judges_and_refines_moderately(
    whole: dict[str, TaskInfo],
) -> None:
    measured = whole["instructions"].measured
    assert 0.25 <= measured["satisfied_sampled"] <= 0.60
    assert 0.60 <= measured["judge_accuracy_sampled"] <= 0.90
    assert measured["judge_accuracy_voted"] >= measured["judge_accuracy_sampled"] + 0.05
    assert measured["refine_success"] >= measured["satisfied_sampled"] + 0.05


def test_small_instruction_policy_judges_in_the_right_form(small: dict[str, TaskInfo]) -> None:
    """It cannot satisfy instructions yet; a judgement without a verdict would count as wrong."""
    assert small["instructions"].measured["judge_accuracy_sampled"] > 0.3


def test_half_of_the_heldout_judgements_are_positive(other: dict[str, TaskInfo]) -> None:
    info = other["instructions"]
    judgements = rows(info.directory / "heldout_judgements.jsonl")
    assert len(judgements) == info.sizes["heldout_judgements"] == len(rows(info.heldout))
    assert sum(row["answer"] == "yes" for row in judgements) == len(judgements) // 2


@pytest.mark.slow
def test_challenges_policy_asks_and_solves_moderately(whole: dict[str, TaskInfo]) -> None:
    info = whole["challenges"]
    assert (len(rows(info.train)), len(rows(info.heldout))) >= (126, 250)
    measured = info.measured
    assert measured["questions_valid"] > 0.85 and 1.2 < measured["questions_steps"] < 2.5
    assert 0.1 <= measured["accuracy_sampled"] <= 0.4
    assert measured["accuracy_greedy"] >= measured["accuracy_sampled"] + 0.2


def test_train_and_heldout_prompts_do_not_overlap(
    tiny: dict[str, TaskInfo], other: dict[str, TaskInfo]
) -> None:
    for info in (*tiny.values(), *other.values()):
        train = rows(info.train)
        heldout = rows(info.heldout)
        prompts = [row["prompt"] for row in train + heldout]
        assert (len(train), len(heldout)) == (info.sizes["train"], info.sizes["heldout"])
        assert len(set(prompts)) == len(prompts)
        assert all(("answer" in row) == (info.task == "arithmetic") for row in train + heldout)


def has_prompts(info: TaskInfo, train: int, heldout: int) -> bool:
    return info.sizes["train"] >= train and info.sizes["heldout"] >= heldout


def test_tasks_have_enough_prompts(tiny: dict[str, TaskInfo]) -> None:
    assert has_prompts(tiny["arithmetic"], 2000, 500)
    # The game is learned from play, not from a variety of prompts.
    assert has_prompts(tiny["game"], 600, 120)


@pytest.mark.slow
def test_other_tasks_have_enough_prompts(whole: dict[str, TaskInfo]) -> None:
    assert all(has_prompts(whole[task], 2000, 500) for task in OTHERS)
    sizes = whole["words"].sizes
    assert (sizes["pairs_train"], sizes["pairs_test"]) == (5000, 500)


@pytest.mark.parametrize("task", ["arithmetic", *OTHERS])
def test_policy_is_loadable_by_transformers_and_vllm(
    tiny: dict[str, TaskInfo], other: dict[str, TaskInfo], task: str
) -> None:
    info = {**tiny, **other}[task]
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


def test_reward_model_judges_with_its_own_tokenizer(other: dict[str, TaskInfo]) -> None:
    info = other["words"]
    assert info.reward_model is not None
    model = AutoModelForSequenceClassification.from_pretrained(info.reward_model)
    tokenizer = AutoTokenizer.from_pretrained(info.reward_model)
    assert model.config.num_labels == 1
    assert tokenizer.get_vocab() != AutoTokenizer.from_pretrained(info.policy).get_vocab()
    assert len(rows(info.directory / "pairs_train.jsonl")) == info.sizes["pairs_train"]
    pairs = rows(info.directory / "pairs_test.jsonl")
    assert len(pairs) == info.sizes["pairs_test"]
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

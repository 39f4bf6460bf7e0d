"""`rayhf fit-scorer` with Ray and DeepSpeed: two objectives hold a cycle and one cannot."""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from launch.fit import fit_scorer
from rayhf.config.fit import FitConfig
from rayhf.errors import ConfigError
from rayhf.scorer.preference_model import PreferenceModel, PreferenceModelConfig
from rayhf.scorer.protocol import ScorerSetup
from rayhf.scorer.reward_model import RewardModel, RewardModelConfig
from rayhf.tiny.language_model import ModelSize, new_model
from rayhf.tiny.tokenizer import POLICY_FORMAT, train_tokenizer
from rayhf.types import Compared, Completion, Prompt, Scored, ScoreRequest, float_array, token_array

pytestmark = pytest.mark.timeout(500)

KINDS = ("rock", "paper", "scissors")
"""Each beats the one before it; the first beats the last."""
FORMS = (
    "i play {}",
    "{} now",
    "my choice is {}",
    "{}",
    "take {} please",
    "it is {} again",
    "{} it is",
    "surely {}",
)
PROMPTS = ("your move", "what do you play?", "choose one", "next round")


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        kind = rng.randrange(3)
        chosen, rejected = (rng.choice(FORMS).format(KINDS[k]) for k in ((kind + 1) % 3, kind))
        rows.append({"prompt": rng.choice(PROMPTS), "chosen": chosen, "rejected": rejected})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random language model, its tokenizer, and pairs of a cyclic game."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("world")
    texts = [text for row in pairs(300, 0) for text in row.values()]
    tokenizer = train_tokenizer(texts, POLICY_FORMAT, max_vocab=400, max_length=512)
    new_model(ModelSize(hidden=64, layers=2, intermediate=128), tokenizer, 0).save_pretrained(
        directory / "model"
    )
    tokenizer.save_pretrained(directory / "model")
    equal = {"prompt": "your move", "chosen": "rock", "rejected": "rock"}
    write(directory / "train.jsonl", [*pairs(1500, 1), equal, equal])
    write(directory / "test.jsonl", pairs(300, 2))
    return directory


def make_config(world: Path, output: str, objective: dict[str, Any], **values: Any) -> FitConfig:
    learner = {
        "lr": 3e-3,
        "threads": 1,
        "schedule": "linear",
        "warmup": 0.1,
        "dtype": "float32",
        "zero_stage": 0,
        "token_budget": 4096,
    }
    learner |= values.pop("learner", {})
    paths = {
        "model": world / "model",
        "train": world / "train.jsonl",
        "test": world / "test.jsonl",
        "output": world / output,
    }
    return FitConfig.model_validate(
        {**paths, "objective": objective, "batch": 50, "epochs": 2, "learner": learner, **values}
    )


def run(settings: FitConfig) -> tuple[dict[str, Any], str]:
    """Return metrics.json and what the command printed; a process starts only one Ray cluster."""
    file = settings.output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "-m", "launch.cli", "fit-scorer", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((settings.output / "metrics.json").read_text()), done.stdout


def refuse(settings: FitConfig) -> str:
    with pytest.raises(ConfigError) as error:
        fit_scorer(settings, Console(file=io.StringIO()))
    return str(error.value)


def request(*answers: str) -> ScoreRequest:
    prompt = Prompt(
        prompt_id="p", messages=({"role": "user", "content": "your move"},), token_ids=(1,)
    )
    return ScoreRequest(prompt=prompt, completions=tuple(completion(answer) for answer in answers))


def completion(text: str) -> Completion:
    return Completion(
        prompt_id="p",
        index=0,
        seed=0,
        text=text,
        token_ids=token_array((1,)),
        logprobs=float_array((0.0,)),
        finish_reason="stop",
        policy_version=0,
    )


ANSWERS = ("i play rock", "paper it is", "surely scissors", "paper it is")


def check_cycle(directory: Path) -> None:
    config = PreferenceModelConfig(model=directory)
    model = PreferenceModel(config, ScorerSetup(base=Path()))
    compared = model.compare([request(*ANSWERS), request("rock", "paper")])
    assert all(isinstance(one, Compared) for one in compared)
    win = compared[0].win  # type: ignore[union-attr]
    assert win[1, 0] > 0.8 and win[2, 1] > 0.8 and win[0, 2] > 0.8
    assert (win + win.T == 1.0).all() and win[1, 3] == 0.5


def test_pairwise_model_represents_the_cycle(world: Path) -> None:
    settings = make_config(world, "pairwise", {"type": "pairwise"}, batch=30, epochs=4)
    metrics, printed = run(settings)
    assert metrics["accuracy"] >= 0.9, metrics
    assert metrics["likelihood_loss"] < 0.3 and metrics["calibration_error"] < 0.2
    assert (
        metrics["train_pairs"],
        metrics["train_equal"],
        metrics["test_pairs"],
        metrics["steps"],
    ) == (1500, 2, 300, 200)
    assert "2 with equal completions" in printed and "held-out accuracy" in printed
    check_cycle(settings.output)
    assert "exists and is not an empty directory" in refuse(settings)


def test_general_preference_represents_the_cycle_on_two_ranks(world: Path) -> None:
    settings = make_config(
        world,
        "gpm",
        {"type": "general_preference", "blocks": 2},
        batch=30,
        epochs=3,
        learner={"lr": 1e-3, "ranks": 2, "zero_stage": 3},
    )
    metrics, _ = run(settings)
    assert metrics["accuracy"] >= 0.9, metrics
    check_cycle(settings.output)
    model = AutoModelForSequenceClassification.from_pretrained(settings.output)
    assert model.config.num_labels == 4


def test_bradley_terry_cannot_represent_the_cycle(world: Path) -> None:
    settings = make_config(
        world, "bradley_terry", {"type": "bradley_terry"}, lora={"rank": 4, "alpha": 8}, epochs=1
    )
    metrics, _ = run(settings)
    assert metrics["accuracy"] <= 0.65, metrics
    config = RewardModelConfig(model=settings.output)
    [outcomes] = RewardModel(config, ScorerSetup(base=Path())).score([request(*ANSWERS)])
    served = [outcome.value for outcome in outcomes if isinstance(outcome, Scored)]
    assert served[1] == pytest.approx(served[3], abs=1e-6)
    model = AutoModelForSequenceClassification.from_pretrained(settings.output)
    tokenizer = AutoTokenizer.from_pretrained(settings.output)
    turns = [{"role": "user", "content": "your move"}, {"role": "assistant", "content": ANSWERS[0]}]
    ids = tokenizer(
        tokenizer.apply_chat_template(turns, tokenize=False),
        add_special_tokens=False,
        return_tensors="pt",
    )
    with torch.inference_mode():
        np.testing.assert_allclose(model(**ids).logits.item(), served[0], atol=1e-5)
    assert not list(settings.output.parent.glob(".bradley_terry*"))


@pytest.fixture
def short(world: Path, tmp_path: Path) -> Iterator[Path]:
    """Another folder for outputs, with the world's files."""
    for name in ("model", "train.jsonl", "test.jsonl"):
        (tmp_path / name).symlink_to(world / name)
    yield tmp_path
    assert not list(tmp_path.glob(".o*")) and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("rows", "objective", "expected"),
    [
        ([], "pairwise", "has no usable pair (it is empty)"),
        (
            [{"prompt": "q", "chosen": "a", "rejected": "a"}] * 2,
            "pairwise",
            "all 2 rows have equal texts",
        ),
        (
            [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a"}],
            "pairwise",
            "row 2: expected `rejected`",
        ),
        (
            [{"prompt": "q", "chosen": "a", "rejected": "b"}],
            "bradley_terry_margin",
            "row 1: `margin` is missing",
        ),
        (
            [
                {"prompt": "q", "chosen": "a", "rejected": "a"},
                {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1},
            ],
            "regression",
            "row 2: `score_rejected` is missing",
        ),
        (
            [{"prompt": "q " * 600, "chosen": "a", "rejected": "b"}],
            "bradley_terry",
            "all 1 pairs have more than the 512 tokens",
        ),
        (
            [{"messages": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"}],
            "bradley_terry",
            "row 1: preference model: the chat template refuses",
        ),
    ],
)
def test_bad_pairs_are_refused_in_one_line(
    short: Path, rows: list[dict[str, Any]], objective: str, expected: str
) -> None:
    bad = write(short / "bad.jsonl", rows)
    message = refuse(make_config(short, "o", {"type": objective}, train=bad))
    assert expected in message and str(bad) in message and "\n" not in message


def test_token_budget_below_one_pair_is_refused(short: Path) -> None:
    message = refuse(make_config(short, "o", {"type": "pairwise"}, learner={"token_budget": 16}))
    assert re.search(
        r"learner.token_budget is 16, but train: .*train.jsonl row 1 needs \d+ padded tokens",
        message,
    )


def test_missing_files_of_the_tiny_presets_say_how_to_build_them(short: Path) -> None:
    tiny = short / ".tiny" / "game"
    hint = f"`rayhf tiny {short / '.tiny'} --task game` builds in minutes"
    objective = {"type": "pairwise"}
    assert refuse(make_config(short, "o", objective, model=tiny / "policy")).endswith(hint)
    assert refuse(make_config(short, "o", objective, train=tiny / "pairs.jsonl")).endswith(hint)
    elsewhere = refuse(make_config(short, "o", objective, train=short / "pairs.jsonl"))
    assert "no such file" in elsewhere and "rayhf tiny" not in elsewhere

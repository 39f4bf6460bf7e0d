"""Code in a model directory never runs, whichever role loads the model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rayhf.config.schema import LearnerConfig, ReferenceConfig
from rayhf.errors import ConfigError
from rayhf.learner.build import load_model
from rayhf.models.source import load_tokenizer, read_model_config
from rayhf.reference.engine import ReferenceEngine
from rayhf.scorer import preference_model, reward_model
from rayhf.tiny.language_model import ModelSize, new_model
from rayhf.tiny.tokenizer import POLICY_FORMAT, train_tokenizer

CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import {kind} as {name}
"""
CLASSES = {
    "AutoConfig": ("configuration_own.OwnConfig", "Qwen2Config"),
    "AutoModelForCausalLM": ("modeling_own.OwnModel", "Qwen2ForCausalLM"),
    "AutoModelForSequenceClassification": (
        "modeling_own.OwnScorer",
        "Qwen2ForSequenceClassification",
    ),
    "AutoTokenizer": ("tokenization_own.OwnTokenizer", "PreTrainedTokenizerFast"),
}
SCORER_FACTS = {
    "kind": "general_preference",
    "objective": "general_preference",
    "outputs": 2,
    "temperature": 1.0,
    "blocks": 1,
}


def make_plain(directory: Path) -> Path:
    tokenizer = train_tokenizer(
        ["Some words, 0123456789"] * 4, POLICY_FORMAT, max_vocab=290, max_length=64
    )
    new_model(ModelSize(hidden=32, layers=1, intermediate=32), tokenizer, seed=0).save_pretrained(
        directory
    )
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain(tmp_path_factory.mktemp("models") / "plain")


def own_code(plain_model: Path, directory: Path, *, model_type: str | None) -> Path:
    """Return a copy with code for every class.

    `model_type` None keeps one that transformers implements.
    """
    shutil.copytree(plain_model, directory)
    mark = str(directory.parent / "mark")
    for target, kind in CLASSES.values():
        module, name = target.split(".")
        with (directory / f"{module}.py").open("a") as file:
            file.write(CODE.format(mark=mark, kind=kind, name=name))
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((directory / name).read_text())
        content["auto_map"] = {key: target for key, (target, _) in CLASSES.items()}
        if name == "tokenizer_config.json":
            content["auto_map"] = {"AutoTokenizer": [None, CLASSES["AutoTokenizer"][0]]}
            content["tokenizer_class"] = (
                "OwnTokenizer" if model_type else content["tokenizer_class"]
            )
        elif model_type is not None:
            content["model_type"] = model_type
        (directory / name).write_text(json.dumps(content))
    return directory


LOADERS: dict[str, Callable[[Path], object]] = {
    "preflight": lambda path: read_model_config(path, key="policy.model"),
    "tokenizer": lambda path: load_tokenizer(path, key="policy.model"),
    "learner": lambda path: load_model(
        path,
        LearnerConfig(dtype="float32"),
        head="policy",
        lora=None,
        settings={"zero_optimization": {"stage": 0}},
    ),
    "critic": lambda path: load_model(
        path,
        LearnerConfig(dtype="float32"),
        head="value",
        lora=None,
        settings={"zero_optimization": {"stage": 0}},
    ),
    "reference": lambda path: ReferenceEngine(path, ReferenceConfig(), dtype="float32"),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_own_code_is_never_run(loader: str, plain_model: Path, tmp_path: Path) -> None:
    """The model is refused where its code is needed; the code is ignored where it is not."""
    with pytest.raises((ConfigError, ValueError, OSError)):
        LOADERS[loader](own_code(plain_model, tmp_path / "needed", model_type="own"))
    assert LOADERS[loader](own_code(plain_model, tmp_path / "ignored", model_type=None)) is not None
    assert not (tmp_path / "mark").exists()


def test_the_mark_would_be_made(plain_model: Path, tmp_path: Path) -> None:
    """The code works where it is trusted, in a new process since it changes transformers."""
    path = own_code(plain_model, tmp_path / "needed", model_type="own")
    trusting = (
        "import sys, transformers; "
        "transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"
    )
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(
        [sys.executable, "-c", trusting, path], env={**os.environ, **cache}, check=True, timeout=120
    )
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("loader", ["preflight", "tokenizer"])
def test_preflight_gives_the_reason_in_one_line(
    loader: str, plain_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"policy\.model: ") as refused:
        LOADERS[loader](own_code(plain_model, tmp_path / "needed", model_type="own"))
    assert "\n" not in str(refused.value)
    if loader == "preflight":
        assert "brings code of its own (auto_map in config.json), which is never run" in str(
            refused.value
        )


@pytest.mark.parametrize("scorer", [reward_model.RewardModel, preference_model.PreferenceModel])
def test_scorers_refuse_it_before_loading(scorer: type, plain_model: Path, tmp_path: Path) -> None:
    path = own_code(plain_model, tmp_path / "needed", model_type="own")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "architectures": ["OwnForSequenceClassification"], "num_labels": 1})
    )
    if scorer is preference_model.PreferenceModel:
        (path / preference_model.SCORER_FILE).write_text(json.dumps(SCORER_FACTS))
    with pytest.raises(ConfigError, match="brings code of its own"):
        scorer(path)
    assert not (tmp_path / "mark").exists()


def test_pickled_weights_are_not_read(plain_model: Path, tmp_path: Path) -> None:
    shutil.copytree(plain_model, tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    for loader in LOADERS.values():
        if loader is not LOADERS["tokenizer"]:
            with pytest.raises((ConfigError, OSError)):
                loader(tmp_path / "pickled")

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
from own_code import make_plain, own_code

from rayhf.config.schema import LearnerConfig, ReferenceConfig
from rayhf.errors import ConfigError
from rayhf.learner.build import load_model
from rayhf.models.source import load_tokenizer, read_model_config
from rayhf.reference.engine import ReferenceEngine
from rayhf.scorer.classifier import SCORER_FILE
from rayhf.scorer.preference_model import PreferenceModel
from rayhf.scorer.protocol import ScorerSetup
from rayhf.scorer.reward_model import RewardModel

SCORER_FACTS = {
    "kind": "general_preference",
    "objective": "general_preference",
    "outputs": 2,
    "temperature": 1.0,
    "blocks": 1,
}


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain(tmp_path_factory.mktemp("models") / "plain")


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


def test_own_code_would_leave_a_mark_if_run(plain_model: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("scorer", [RewardModel, PreferenceModel])
def test_scorers_refuse_own_code_before_loading(
    scorer: type[RewardModel] | type[PreferenceModel], plain_model: Path, tmp_path: Path
) -> None:
    path = own_code(plain_model, tmp_path / "needed", model_type="own")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "architectures": ["OwnForSequenceClassification"], "num_labels": 1})
    )
    if scorer is PreferenceModel:
        (path / SCORER_FILE).write_text(json.dumps(SCORER_FACTS))
    with pytest.raises(ConfigError, match="brings code of its own"):
        scorer(scorer.Config(model=path), ScorerSetup(base=tmp_path))
    assert not (tmp_path / "mark").exists()


def test_pickled_weights_are_not_read(plain_model: Path, tmp_path: Path) -> None:
    shutil.copytree(plain_model, tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    for loader in LOADERS.values():
        if loader is not LOADERS["tokenizer"]:
            with pytest.raises((ConfigError, OSError)):
                loader(tmp_path / "pickled")

"""A model directory that brings code for every class of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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


def make_plain(directory: Path) -> Path:
    tokenizer = train_tokenizer(
        ["Some words, 0123456789"] * 4, POLICY_FORMAT, max_vocab=290, max_length=64
    )
    new_model(ModelSize(hidden=32, layers=1, intermediate=32), tokenizer, seed=0).save_pretrained(
        directory
    )
    tokenizer.save_pretrained(directory)
    return directory


def own_code(plain_model: Path, directory: Path, *, model_type: str | None) -> Path:
    """A copy with code for every class; `model_type` None keeps one that transformers has
    itself."""
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

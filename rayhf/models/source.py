"""Checks of a user's model directory before anything starts, and how its files are loaded.

In: a Hugging Face model directory. Out: its config.json, its tokenizer, facts about it; ConfigError
where it cannot be used. A model directory is data: code that it contains is never run, and weights
are safetensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rayhf.errors import ConfigError, did_you_mean
from rayhf.models.hub import has_weights
from rayhf.models.weight_files import read_json_object, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AS_DATA: Final = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of from_pretrained for configs and tokenizers."""
WEIGHTS_AS_DATA: Final = {**AS_DATA, "use_safetensors": True}
"""Arguments of from_pretrained for models."""
_NAMES = 10_000
"""Names of a directory among which a misspelled one is looked for."""
ModelConfig = Mapping[str, Any]
"""The content of a config.json."""


def read_model_config(path: Path, *, key: str) -> ModelConfig:
    """Return the model's config.json.

    Raises ConfigError where the directory is not a Hugging Face model with its weights.
    """
    if not path.is_dir():
        raise ConfigError(
            f"{key}: no such model directory {path}; expected a Hugging Face model "
            f"(config.json, *.safetensors) or a hub name org/name{missing_hint(path)}"
        )
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{key}: {path} has no config.json; expected a Hugging Face model directory"
        )
    config: ModelConfig = read_json_object(file, key=key)
    if has_weights(path):
        weight_files(path, key=key)
    refuse_own_code(path, config, key=key)
    return config


def missing_hint(path: Path) -> str:
    """Return the end of a message about a path where nothing is.

    The nearest name in its directory, or how to build a file of the tiny world; "" otherwise.
    """
    try:
        return did_you_mean(path.name, [e.name for e in islice(path.parent.iterdir(), _NAMES)])
    except OSError:  # there is no such directory, or it cannot be listed
        pass
    parts = path.parts
    if ".tiny" not in parts[:-1]:
        return ""
    place = parts.index(".tiny") + 1
    root = Path(*parts[:place])
    if root.is_relative_to(Path.cwd()):
        root = root.relative_to(Path.cwd())
    task = f" --task {parts[place]}" if parts[place + 1 :] else ""
    return f"; it belongs to the tiny world, which `rayhf tiny {root}{task}` builds in minutes"


def refuse_own_code(path: Path, config: ModelConfig, *, key: str) -> None:
    """Raise ConfigError for a model that only its own code can load.

    Where transformers implements the model's type, code in the directory is ignored.
    """
    if "auto_map" not in config:
        return
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        raise ConfigError(
            f"{key}: {path} brings code of its own (auto_map in config.json), which is never run; "
            f"expected a model_type that transformers has, got {config.get('model_type')!r}"
        )


def load_tokenizer(path: Path, *, key: str, template: str | None = None) -> PreTrainedTokenizerBase:
    """Load the directory's tokenizer; `template` replaces its chat template.

    Raises ConfigError where there is none, or it has no chat template.
    """
    from transformers import AutoTokenizer

    if not ((path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file()):
        raise ConfigError(f"{key}: {path} has no tokenizer (tokenizer.json)")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), **AS_DATA)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}: the tokenizer of {path} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    if template is not None:
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{key}: the tokenizer of {path} has no chat template; add chat_template.jinja, or set "
            "policy.chat_template"
        )
    return tokenizer


def model_length(config: ModelConfig) -> int | None:
    """Return the longest sequence that the model supports, in tokens."""
    value = config.get("max_position_embeddings")
    return int(value) if value else None


def tokenizer_fingerprint(path: Path) -> str:
    """Return a hash of the files that decide token ids: vocabulary, merges, special tokens."""
    file = path / "tokenizer.json"
    data = (
        file.read_bytes()
        if file.is_file()
        else b"".join(p.read_bytes() for p in sorted(path.glob("*token*")))
    )
    return hashlib.blake2b(data, digest_size=8).hexdigest()

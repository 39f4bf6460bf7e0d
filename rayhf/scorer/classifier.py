"""Frozen sequence classifiers of transformers: the models of reward and preference scorers.

In: a Hugging Face model directory with its own tokenizer and chat template. Out: the loaded model.
`check_classifier` reads only the small files, before anything starts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from rayhf.config.models import ModelName
from rayhf.config.scorers import ClassifierModel, Dtype, ScorerEntryConfig
from rayhf.errors import ConfigError
from rayhf.models.hub import local_directory
from rayhf.models.source import AS_DATA, WEIGHTS_AS_DATA, refuse_own_code
from rayhf.scorer.protocol import ScorerSetup

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SCORER_FILE = "rayhf_scorer.json"
"""Facts that `rayhf fit-scorer` writes beside a model's config.json."""
_UNBOUNDED = 10**9
"""Tokenizers without a limit say 10**30."""


class ClassifierEntryConfig(ScorerEntryConfig):
    """Settings of a scorer that is a sequence classifier."""

    model: ModelName
    """Model directory or hub name, with a tokenizer that has a chat template."""
    dtype: Dtype = "float32"
    token_budget: PositiveInt = 16384
    """Padded tokens per forward pass; a single longer text has a pass of its own."""
    max_length: PositiveInt | None = None
    """Limit on a whole text (template, prompt and completions), in tokens. Default: the model's
    own."""

    @property
    def loads(self) -> ClassifierModel:
        """The model in its process, for memory estimates."""
        return ClassifierModel(model=self.model, dtype=self.dtype, token_budget=self.token_budget)


@dataclass(slots=True)
class Classifier:
    """A loaded model, in evaluation mode, on its device."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    """None once it is closed."""
    device: torch.device
    max_length: int
    """Limit on a whole text, in tokens."""

    def close(self) -> None:
        """Release the memory of the weights."""
        import torch

        self.model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def load_classifier(config: ClassifierEntryConfig, setup: ScorerSetup, *, title: str) -> Classifier:
    """Load the model; errors call it `title`.

    Raises ConfigError for weights or a tokenizer that do not fit, and for a max_length beyond the
    model's.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    directory = local_directory(config.model, setup.base)
    if setup.threads is not None:
        torch.set_num_threads(setup.threads)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **AS_DATA)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            directory,
            dtype=getattr(torch, config.dtype),
            output_loading_info=True,
            **WEIGHTS_AS_DATA,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{title} {directory}: {one_line(error)}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(
            f"{title} {directory}: the checkpoint has no weights for {', '.join(missing[:3])}"
        )
    largest = max(tokenizer.get_vocab().values())
    embedded = model.get_input_embeddings().num_embeddings
    if largest >= embedded:
        raise ConfigError(
            f"{title} {directory}: its tokenizer has ids up to {largest}, "
            f"the model embeds {embedded}"
        )
    limit = length_limit(model.config.get_text_config(), tokenizer)
    if config.max_length is not None and config.max_length > limit:
        raise ConfigError(
            f"{title} {directory}: max_length is {config.max_length}, "
            f"the model reads at most {limit} tokens"
        )
    device = torch.device(setup.device)
    model = model.eval().requires_grad_(False).to(device)
    return Classifier(tokenizer, model, device, config.max_length or limit)


def length_limit(model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the longest text that the model and its tokenizer take, in tokens."""
    limits = [getattr(model_config, "max_position_embeddings", None), tokenizer.model_max_length]
    # XLNet says -1.
    return min([int(limit) for limit in limits if limit and limit > 0] + [_UNBOUNDED])


def check_classifier(directory: Path, *, title: str) -> int:
    """Check the small files of a classifier; errors call it `title`. Returns its outputs.

    Raises ConfigError unless it is a sequence classifier with a tokenizer and a chat template.
    """
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ConfigError(
            f"{title} {directory}: there is no config.json; expected a Hugging Face model directory"
        )
    config = read_json(config_file)
    refuse_own_code(directory, config, key=title)
    names = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        raise ConfigError(
            f"{title} {directory}: architectures is {', '.join(names) or 'none'}; "
            "expected a ...ForSequenceClassification"
        )
    tokenizer_file = directory / "tokenizer_config.json"
    if not tokenizer_file.is_file():
        raise ConfigError(
            f"{title} {directory}: there is no tokenizer_config.json; it needs its own tokenizer"
        )
    templates = [directory / "chat_template.jinja", directory / "chat_template.json"]
    if not any(file.is_file() for file in templates) and not read_json(tokenizer_file).get(
        "chat_template"
    ):
        raise ConfigError(
            f"{title} {directory}: its tokenizer has no chat template "
            "(chat_template.jinja or tokenizer_config.json)"
        )
    # transformers leaves id2label out for its default of two labels.
    return len(config["id2label"]) if "id2label" in config else int(config.get("num_labels", 2))


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object of a file. Raises ConfigError where there is none."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a JSON object")
    return content


def one_line(error: Exception) -> str:
    """Return type and message in one line of at most 400 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]

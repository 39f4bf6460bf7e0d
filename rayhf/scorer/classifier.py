"""A frozen sequence classifier of transformers with its tokenizer: what reward models and
preference models are made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayhf.errors import ConfigError
from rayhf.models.source import AS_DATA, WEIGHTS_AS_DATA

_UNBOUNDED = 10**9
"""Tokenizers without a limit say 10**30."""


@dataclass(slots=True)
class Classifier:
    """Loaded, in evaluation mode, on its device."""

    tokenizer: Any
    model: Any
    """None once it is closed."""
    device: Any
    max_length: int
    """Tokens of a whole text."""

    def close(self) -> None:
        """Give the weights' memory back."""
        import torch

        self.model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def load_classifier(
    directory: Path,
    what: str,
    *,
    dtype: str,
    max_length: int | None,
    device: str,
    threads: int | None,
) -> Classifier:
    """Errors call it `what`. ConfigError for weights or a tokenizer that do not fit, and for a
    max_length beyond the model's."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **AS_DATA)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=getattr(torch, dtype), output_loading_info=True, **WEIGHTS_AS_DATA
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{what} {directory}: {one_line(error)}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(
            f"{what} {directory}: the checkpoint has no weights for {', '.join(missing[:3])}"
        )
    largest, embedded = (
        max(tokenizer.get_vocab().values()),
        model.get_input_embeddings().num_embeddings,
    )
    if largest >= embedded:
        raise ConfigError(
            f"{what} {directory}: its tokenizer has ids up to {largest}, the model embeds {embedded}"
        )
    own = length_limit(model.config.get_text_config(), tokenizer)
    if max_length is not None and max_length > own:
        raise ConfigError(
            f"{what} {directory}: max_length is {max_length}, the model reads at most {own} tokens"
        )
    place = torch.device(device)
    return Classifier(
        tokenizer, model.eval().requires_grad_(False).to(place), place, max_length or own
    )


def length_limit(model_config: Any, tokenizer: Any) -> int:
    """Tokens that the model and its tokenizer can take."""
    limits = [getattr(model_config, "max_position_embeddings", None), tokenizer.model_max_length]
    return min(
        [int(limit) for limit in limits if limit and limit > 0] + [_UNBOUNDED]
    )  # XLNet says -1


def read_json(file: Path) -> dict[str, Any]:
    """Raises ConfigError for a file that is no JSON object."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a JSON object")
    return content


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]

"""A small tokenizer with chat tokens, in a model directory where a test needs one."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from rayhf.tiny.language_model import ModelSize, new_model
from rayhf.tiny.tokenizer import POLICY_FORMAT, train_tokenizer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; <|end|> is token 1."""
    texts = ["Some words, 0123456789"] * 4
    return train_tokenizer(texts, POLICY_FORMAT, max_vocab=290, max_length=256)


def make_model_directory(directory: Path) -> Path:
    tokenizer = make_tokenizer()
    size = ModelSize(hidden=32, layers=2, intermediate=32)
    new_model(size, tokenizer, seed=0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory

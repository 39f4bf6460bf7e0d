"""Fingerprints of a campaign's inputs besides its data: chat template, rendered prompts, models.

A campaign that is continued loads its models again, the frozen reference among them, and renders
its prompts again: the same names must still hold the same content.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rayhf.models.hub import has_weights
from rayhf.models.weight_files import fingerprints
from rayhf.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def input_fingerprints(
    models: Mapping[str, Path], tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt]
) -> dict[str, str]:
    """Return a hash of each input by a name that a message can show.

    Args:
        models: model directories by config key.
        tokenizer: with the policy's chat template.
        prompts: the training prompts.
    """
    inputs = {
        f"{key}/{name}": value
        for key, path in models.items()
        if has_weights(path)
        for name, value in fingerprints(path, key=key).items()
    }
    inputs["chat template"] = _hash([tokenizer.get_chat_template().encode()])
    inputs["prompts as rendered"] = _hash(
        array("q", [len(prompt.token_ids), *prompt.token_ids]).tobytes() for prompt in prompts
    )
    return inputs


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()

"""Tokens that end a completion: those of the model directory, and the chat template's.

A model may end its turn with another token than its tokenizer's end of text: completions would
then run on until they are cut.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from rayhf.data.chat import end_of_turn
from rayhf.errors import ConfigError
from rayhf.models.weight_files import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_token_ids(
    directory: Path, tokenizer: PreTrainedTokenizerBase, *, known: Collection[int] = ()
) -> tuple[int, ...]:
    """Return the ids that end a completion, those in `known` included, in order.

    They are the eos_token_id of generation_config.json (one or several), the tokenizer's EOS token,
    and the token that its chat template writes after an assistant's turn. Raises ConfigError where
    there are none.
    """
    ids = set(known)
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    file = directory / "generation_config.json"
    if file.is_file():
        listed = read_json_object(file, key="policy.model").get("eos_token_id")
        ids.update([listed] if isinstance(listed, int) else listed or [])
    turn_end = end_of_turn(tokenizer)
    if turn_end is not None:
        ids.add(tokenizer.convert_tokens_to_ids(turn_end))
    if not ids:
        raise ConfigError(
            f"policy.model: {directory} says nowhere which token ends a completion: not its "
            "tokenizer (eos_token), not its generation_config.json (eos_token_id), not its chat "
            "template (a special token after an assistant's turn)"
        )
    return tuple(sorted(ids))


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the id of every special token by its text."""
    return {
        str(token): token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }

"""Files of answers: what one policy answered to the prompts of a suite.

`rayhf eval` writes them as JSON lines, one per prompt: {"messages": [...], "completions": [{"text":
...}, ...]}. Others can be read too: a row has `messages`, `prompt` or `instruction`, and
`completions`, `completion`, `response` or `output` (AlpacaEval's outputs).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rayhf.data.columns import Row
from rayhf.data.conversations import prompt_messages
from rayhf.data.readers import read_rows
from rayhf.errors import ConfigError
from rayhf.types import Message, Prompt

_SINGLE = ("completion", "response", "output")


def read_answers(path: Path, *, key: str) -> dict[str, tuple[str, ...]]:
    """Return the answers of a file by `messages_key`.

    Raises ConfigError, which names the config key `key`, for a file that is not one of answers.
    """
    answers: dict[str, tuple[str, ...]] = {}
    for where, row in read_rows(path, key=key):
        if "instruction" in row and not ("prompt" in row or "messages" in row):
            row = {**row, "prompt": row["instruction"]}
        messages = prompt_messages({k: row[k] for k in ("prompt", "messages") if k in row}, where)
        answers[messages_key(messages)] = _texts(row, where)
    if not answers:
        raise ConfigError(f"{key}: {path} has no answers")
    return answers


def answers_to(
    prompts: Sequence[Prompt], answers: Mapping[str, tuple[str, ...]], *, key: str
) -> list[tuple[str, ...]]:
    """Return the answers to each prompt. Raises ConfigError where one has none."""
    found = [answers.get(messages_key(prompt.messages)) for prompt in prompts]
    missing = sum(texts is None for texts in found)
    if missing:
        raise ConfigError(
            f"{key}: {missing} of {len(prompts)} prompts have no answer there; expected answers to "
            "the same prompts"
        )
    return [texts for texts in found if texts is not None]


def messages_key(messages: Sequence[Message]) -> str:
    """Return what identifies a conversation: roles and contents."""
    return json.dumps([[message["role"], message["content"]] for message in messages])


def _texts(row: Row, where: str) -> tuple[str, ...]:
    given = row.get("completions")
    if isinstance(given, list) and given:
        texts = [item.get("text") if isinstance(item, Mapping) else item for item in given]
    else:
        texts = [row[name] for name in _SINGLE if name in row][:1]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            f"{where}: expected `completions` (a list of texts, or of objects with `text`) or "
            f"`output`, got keys {', '.join(sorted(row))}"
        )
    return tuple(str(text) for text in texts)

"""Files of answers: what one policy answered to the prompts of a suite.

`rayhf eval` writes them as JSON lines, one per prompt: {"messages": [...], "completions": [{"text":
...}, ...], "answer": the reference answer, "row": the prompt's other columns}. Others can be read
too: a row has `messages`, `prompt` or `instruction`, and `completions`, `completion`, `response` or
`output` (AlpacaEval's outputs).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayhf.data.columns import Row
from rayhf.data.conversations import parse_answer, prompt_messages
from rayhf.data.readers import read_rows
from rayhf.errors import ConfigError
from rayhf.types import Message, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A prompt of a file and the answers to it."""

    messages: tuple[Message, ...]
    texts: tuple[str, ...]
    answer: str | None
    """Reference answer; None where the file has none."""
    row: Mapping[str, object]
    """Other columns of the prompt's row, for scorers."""


_SINGLE = ("completion", "response", "output")


def read_answers(path: Path, *, key: str) -> dict[str, Answered]:
    """Return the prompts of a file with their answers, by `messages_key`.

    Raises ConfigError, which names the config key `key`, for a file that is not one of answers.
    """
    answers: dict[str, Answered] = {}
    for where, row in read_rows(path, key=key):
        if "instruction" in row and not ("prompt" in row or "messages" in row):
            row = {**row, "prompt": row["instruction"]}
        messages = prompt_messages({k: row[k] for k in ("prompt", "messages") if k in row}, where)
        given = row.get("row")
        answers[messages_key(messages)] = Answered(
            messages=messages,
            texts=_texts(row, where),
            answer=parse_answer(row, where),
            row=given if isinstance(given, Mapping) else {},
        )
    if not answers:
        raise ConfigError(f"{key}: {path} has no answers")
    return answers


def answers_to(
    prompts: Sequence[Prompt], answers: Mapping[str, Answered], *, key: str
) -> list[tuple[str, ...]]:
    """Return the answers to each prompt. Raises ConfigError where one has none."""
    found = [answers.get(messages_key(prompt.messages)) for prompt in prompts]
    missing = sum(own is None for own in found)
    if missing:
        raise ConfigError(
            f"{key}: {missing} of {len(prompts)} prompts have no answer there; expected answers to "
            "the same prompts"
        )
    return [own.texts for own in found if own is not None]


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

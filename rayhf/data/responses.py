"""Responses of rows: `completion` (or `response`) as text or messages, after its prompt."""

from __future__ import annotations

from rayhf.data.columns import Row
from rayhf.data.conversations import message_list, parse_messages
from rayhf.errors import ConfigError
from rayhf.types import Message

COLUMNS = ("completion", "response")


def parse_completion(row: Row, where: str) -> tuple[tuple[Message, ...], str] | None:
    """Return (prompt, response text) of a row; None where it has no response.

    The prompt is `prompt` or `messages`. A response may be text, one assistant message, or messages
    that repeat the prompt and end with the assistant's; `prompt` may then be missing. Raises
    ConfigError, beginning with `where`.
    """
    column = next((name for name in COLUMNS if row.get(name) is not None), None)
    if column is None:
        return None
    has_prompt = any(row.get(name) is not None for name in ("prompt", "messages"))
    prompt = parse_messages(row, where) if has_prompt else None
    value = row[column]
    if isinstance(value, str):
        if prompt is None:
            raise ConfigError(f"{where}: `{column}` is a text; expected a `prompt` with it")
        return prompt, value
    messages = message_list(value, column, where)
    before = messages[:-1]
    if messages[-1]["role"] != "assistant":
        raise ConfigError(
            f"{where}: `{column}` must end with an assistant turn, got {messages[-1]['role']!r}"
        )
    if prompt is not None and before and before != prompt:
        raise ConfigError(
            f"{where}: the messages of `{column}` before its response are not those of the prompt"
        )
    if not (before or prompt):
        raise ConfigError(f"{where}: `{column}` has no prompt before its response")
    return before or prompt or (), messages[-1]["content"]

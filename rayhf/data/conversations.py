"""Conversations of rows: `prompt` or `messages`, as the ecosystem's data sets write them.

A message is {"role", "content"} with any further keys (`tool_calls`, `name`, `tool_call_id`).
`content` is text, or a list of text parts, which are joined. `prompt` may be one user message as
text, or a list of messages (TRL, verl). Error messages begin with the row's place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rayhf.data.columns import Row
from rayhf.errors import ConfigError
from rayhf.types import Message


def parse_messages(row: Row, where: str) -> tuple[Message, ...]:
    """Return the conversation of a row, from `prompt` or `messages`.

    Raises ConfigError, beginning with `where`, for a row that has neither, both, or a malformed
    one.
    """
    prompt = row.get("prompt")
    messages = row.get("messages")
    if (prompt is None) == (messages is None):
        if prompt is not None:
            raise ConfigError(
                f"{where}: both `prompt` and `messages` are given; leave one out with `drop`"
            )
        keys = ", ".join(sorted(row)) or "nothing"
        raise ConfigError(
            f"{where}: expected either `prompt` (text or messages) or `messages` (list), "
            f"got keys {keys}"
        )
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ConfigError(f"{where}: `prompt` is empty")
        return ({"role": "user", "content": prompt},)
    if prompt is not None:
        if not isinstance(prompt, list):
            raise ConfigError(
                f"{where}: `prompt` must be text or a list of messages, got {prompt!r:.60}"
            )
        return message_list(prompt, "prompt", where)
    return message_list(messages, "messages", where)


def prompt_messages(
    row: Row, where: str, *, drop_last_assistant: bool = False
) -> tuple[Message, ...]:
    """Return the conversation that the policy is to continue; see `parse_messages`.

    Raises ConfigError for one that ends with an assistant turn, unless it is to be cut.
    """
    messages = parse_messages(row, where)
    if drop_last_assistant:
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise ConfigError(f"{where}: the conversation has assistant turns only")
    if messages[-1]["role"] == "assistant":
        raise ConfigError(
            f"{where}: the conversation ends with an assistant turn, and the policy is to write "
            "the next one; set `drop_last_assistant: true` on the source to cut it, or train on "
            "it with algorithm sft"
        )
    return messages


def message_list(value: object, column: str, where: str) -> tuple[Message, ...]:
    """Return a column's list of messages, checked. Raises ConfigError."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}: `{column}` must be a non-empty list, got {value!r:.60}")
    return tuple(_message(message, column, where) for message in value)


def _message(message: Any, column: str, where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ConfigError(
            f"{where}: a message of `{column}` must have `role` and `content`, got {message!r:.60}"
        )
    # Arrow files give every message all keys that any message has.
    kept = {key: value for key, value in message.items() if value is not None}
    return {**kept, "content": _content(kept, column, where)}


def _content(message: Mapping[str, Any], column: str, where: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list):
        return "".join(_part(part, column, where) for part in content)
    raise ConfigError(
        f"{where}: a message of `{column}` must have `content` (text, or a list of text parts), "
        f"got {dict(message)!r:.60}"
    )


def _part(part: Any, column: str, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        kind = part.get("type", "text" if "text" in part else None)
        if kind == "text" and isinstance(part.get("text"), str):
            return str(part["text"])
        if isinstance(kind, str):
            raise ConfigError(
                f"{where}: a message of `{column}` has a part of type {kind!r:.40}; "
                "only text is read"
            )
    raise ConfigError(f"{where}: a message of `{column}` has the part {part!r:.60}; expected text")


def parse_tools(row: Row, where: str) -> list[Mapping[str, Any]] | None:
    """Return the functions of the column `tools`: a list of JSON schemas, or that list as text.

    None where there are none. Raises ConfigError.
    """
    tools: Any = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise ConfigError(f"{where}: `tools` is not valid JSON, got {tools!r:.60}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ConfigError(f"{where}: `tools` must be a list of functions, got {tools!r:.60}")
    return tools


def parse_answer(row: Row, where: str) -> str | None:
    """Return the reference answer as text; None where there is none.

    A float without a fraction is written as an integer: pandas makes integers floats where a value
    is missing. Raises ConfigError for anything but text and numbers.
    """
    answer = row.get("answer")
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        raise ConfigError(f"{where}: `answer` must be text or a number, got {answer!r:.60}")
    if isinstance(answer, float) and answer.is_integer() and abs(answer) < 2**53:
        return str(int(answer))
    return str(answer)

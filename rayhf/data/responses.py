"""Rows with given responses: a prompt as text or messages, and responses as text or messages.

Known shapes: TRL's prompt-completion rows, standard and conversational; conversations in
`messages`; pairs whose `chosen` and `rejected` are whole conversations that repeat the prompt
(UltraFeedback), with or without a `prompt`.
"""

from __future__ import annotations

import json
from typing import Any

from rayhf.data.readers import Row
from rayhf.errors import ConfigError
from rayhf.types import Message

Messages = tuple[Message, ...]


def parse_conversation(value: object, where: str, field: str) -> Messages:
    """Return the messages of a list. Raises ConfigError, beginning with `where`.

    A content may be a list of text parts. Keys besides role and content (tool calls) are kept for
    the chat template.
    """
    if not isinstance(value, list) or not value:
        raise ConfigError(
            f"{where}: `{field}` must be a non-empty list of messages, got {value!r:.60}"
        )
    return tuple(_message(message, where, field) for message in value)


def _message(value: object, where: str, field: str) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise ConfigError(
            f"{where}: a message of `{field}` must have a string `role`, got {value!r:.60}"
        )
    message: dict[str, Any] = {key: part for key, part in value.items() if part is not None}
    content = value.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        kinds = {part.get("type") if isinstance(part, dict) else part for part in content}
        if kinds - {"text"}:
            raise ConfigError(
                f"{where}: `{field}` has parts of type {', '.join(map(str, kinds - {'text'}))}; "
                "expected text only"
            )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ConfigError(
            f"{where}: a message of `{field}` must have a string `content`, got {value!r:.60}"
        )
    return {**message, "content": content}


def prompt_of(row: Row, where: str) -> Messages | None:
    """Return the messages of `prompt` (a string or a list), or of `messages`; None without both."""
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return ({"role": "user", "content": prompt},)
    if prompt is not None:
        if isinstance(prompt, str):
            raise ConfigError(f"{where}: `prompt` is empty")
        return parse_conversation(prompt, where, "prompt")
    messages = row.get("messages")
    return None if messages is None else parse_conversation(messages, where, "messages")


def response_of(
    value: object, prompt: Messages | None, where: str, field: str
) -> tuple[Messages, str]:
    """Return (prompt, response text) of a text, or of messages that end with the assistant's.

    Messages may repeat the prompt; without `prompt` they must contain it.
    """
    if isinstance(value, str):
        if prompt is None:
            raise ConfigError(f"{where}: `{field}` is a text; expected a `prompt` with it")
        return prompt, value
    messages = parse_conversation(value, where, field)
    if messages[-1]["role"] != "assistant":
        raise ConfigError(
            f"{where}: `{field}` must end with an assistant message, got {messages[-1]['role']!r}"
        )
    before = messages[:-1]
    if prompt is None and not before:
        raise ConfigError(f"{where}: `{field}` has no prompt before its response")
    if prompt is not None and before and before != prompt:
        raise ConfigError(
            f"{where}: the messages of `{field}` before its response are not those of the prompt"
        )
    return before or prompt or (), messages[-1]["content"]


def completion_of(row: Row, prompt: Messages | None, where: str) -> tuple[Messages, str] | None:
    """Return (prompt, response text) of `completion` or `response`; None without either."""
    field = next((f for f in ("completion", "response") if row.get(f) is not None), None)
    return None if field is None else response_of(row[field], prompt, where, field)


def pair_of(row: Row, where: str) -> tuple[Messages, str, str]:
    """Return (prompt, chosen, rejected) of a row with `chosen` and `rejected`.

    Raises ConfigError, beginning with `where`, for a row without them and for responses to
    different prompts.
    """
    for field in ("chosen", "rejected"):
        if row.get(field) is None:
            raise ConfigError(
                f"{where}: expected `{field}` (a string or messages), got keys "
                f"{', '.join(sorted(row))}"
            )
    whole = isinstance(row["chosen"], list) and row.get("prompt") is None
    prompt = None if whole else prompt_of(row, where)
    chosen_prompt, chosen = response_of(row["chosen"], prompt, where, "chosen")
    rejected_prompt, rejected = response_of(row["rejected"], prompt, where, "rejected")
    if chosen_prompt != rejected_prompt:
        raise ConfigError(
            f"{where}: `chosen` and `rejected` differ before their last turns; expected one prompt"
        )
    return chosen_prompt, chosen, rejected


def tools_of(row: Row, where: str) -> list[dict[str, Any]] | None:
    """Return the tools of a row, for its chat template: a list, or a list as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            raise ConfigError(f"{where}: `tools` is not valid JSON, got {tools!r:.60}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(f"{where}: `tools` must be a list of mappings, got {tools!r:.60}")
    return tools

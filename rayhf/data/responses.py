"""Rows with given responses: a prompt as text or messages, and responses as text or messages.

Known shapes: TRL's prompt-completion rows, standard and conversational; conversations in
`messages`; pairs whose `chosen` and `rejected` are whole conversations that repeat the prompt
(UltraFeedback), with or without a `prompt`.
"""

from __future__ import annotations

from rayhf.data.columns import Row
from rayhf.data.conversations import message_list, prompt_messages
from rayhf.errors import ConfigError
from rayhf.types import Message

Messages = tuple[Message, ...]


def prompt_of(row: Row, where: str) -> Messages | None:
    """Return the conversation of `prompt`, or else of `messages`; None without both."""
    given = next((name for name in ("prompt", "messages") if row.get(name) is not None), None)
    return None if given is None else prompt_messages({given: row[given]}, where)


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
    messages = message_list(value, field, where)
    if messages[-1]["role"] != "assistant":
        raise ConfigError(
            f"{where}: `{field}` must end with an assistant turn, got {messages[-1]['role']!r}"
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

"""Conversations that an algorithm renders itself, and what it reads in the texts that follow them.

Config side: a conversation is turns of Jinja2, checked for unknown variables. Run-time side:
`Dialogue` renders it, `last_group` finds a part of a generated text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Literal

from pydantic import BeforeValidator

from rayhf.config.base import Section
from rayhf.config.jinja_text import variables_of
from rayhf.data.chat import Chat
from rayhf.data.jinja_sandbox import SandboxedTemplate
from rayhf.errors import ConfigError
from rayhf.types import Message


class TurnTemplate(Section):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    """Role of the message."""
    content: str
    """Jinja2 template of the message."""


def _one_turn(value: object) -> object:
    return ({"role": "user", "content": value},) if isinstance(value, str) else value


Conversation = Annotated[
    tuple[TurnTemplate, ...],
    BeforeValidator(_one_turn, json_schema_input_type=str | tuple[TurnTemplate, ...]),
]
"""A string is one user turn."""


def user_turn(content: str) -> tuple[TurnTemplate, ...]:
    """Return the conversation of one user turn."""
    return (TurnTemplate(role="user", content=content),)


def check_conversation(value: Conversation, known: AbstractSet[str]) -> Conversation:
    """Return a conversation that ends with the user and has `known` variables only.

    Raises ValueError for another one.
    """
    if not value or value[-1].role != "user":
        raise ValueError("the last turn must be the user's")
    names: set[str] = set()
    for turn in value:
        try:
            names |= variables_of(turn.content)
        except ValueError as error:
            raise ValueError(f"not a Jinja2 template ({error})") from None
    if unknown := sorted(names - known):
        raise ValueError(f"unknown variable {unknown[0]}; valid: {', '.join(sorted(known))}")
    return value


def check_pattern(value: str) -> str:
    """Return a regular expression that has a group. Raises ValueError for another text."""
    try:
        groups = re.compile(value).groups
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    if groups < 1:
        raise ValueError("expected a group ( ) around the part to extract")
    return value


class Dialogue:
    """A conversation's compiled templates.

    Args:
        conversation: the templates.
        key: their place in the config, for error messages.
    """

    def __init__(self, conversation: Conversation, key: str) -> None:
        self._key = key
        # The templates are the user's own, but they render generated text: therefore the sandbox.
        self._turns = [
            (turn.role, SandboxedTemplate(turn.content, key=key, keep_trailing_newline=True))
            for turn in conversation
        ]

    def render(self, variables: Mapping[str, object]) -> list[Message]:
        """Return the messages."""
        return [{"role": role, "content": turn.render(variables)} for role, turn in self._turns]

    def check(self, chat: Chat, variables: Mapping[str, object]) -> None:
        """Render it by the policy's chat template. Raises ConfigError where that cannot."""
        try:
            chat.render(self.render(variables))
        except ConfigError as error:
            raise ConfigError(f"{self._key}: {error}") from None


def last_group(pattern: re.Pattern[str], text: str) -> str | None:
    """Return group 1 of the last match: a text may quote the form before it uses it."""
    groups = [match[1] for match in pattern.finditer(text)]
    return groups[-1] if groups else None


def instruction_text(messages: Sequence[Message]) -> str:
    """Return the prompt as one text: a single turn as it is, several turns with their roles."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(
        f"{message['role'].capitalize()}: {message['content']}" for message in messages
    )

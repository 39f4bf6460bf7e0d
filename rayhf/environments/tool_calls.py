"""Tool calls in a policy's message, in the format of Hermes and Qwen.

In: text with any number of `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Out: the
calls, or why one cannot be read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
_FORM = 'expected <tool_call>{"name": ..., "arguments": {...}}</tool_call>'


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function's name and its arguments."""

    name: str
    arguments: Mapping[str, Any]


def tool_calls(text: str) -> list[ToolCall | str]:
    """Return the calls in their order; a text is why one cannot be read."""
    return [
        _read(match[1]) if match[2] else f"the call is not closed; {_FORM}"
        for match in _CALL.finditer(text)
    ]


def _read(text: str) -> ToolCall | str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"the call is not valid JSON ({error}); {_FORM}"
    match value:
        case {"name": str(name), "arguments": dict(arguments)}:
            return ToolCall(name, arguments)
        case {"name": str(name)} if "arguments" not in value:
            return ToolCall(name, {})
    return f"the call has no name and arguments; {_FORM}"

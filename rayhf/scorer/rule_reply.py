"""Responses of a rule's process, which is not trusted: a rule may write to any of its pipes.

In: lines of bytes. Out: outcomes, or LostError for anything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rayhf.errors import clean_line
from rayhf.types import Failed, Invalid, Outcome, Scored, Skipped

PARTS = 64
"""Limit on the parts of one score."""
_PART_CHARS = 64
_REASONS = ("invalid", "skipped", "failed", "hung", "late", "unreachable", "broken")

Result = tuple[str, Outcome]
"""What the child said about a completion, as status and outcome; statuses beside "scored" are
explained at rule_call.problem_of."""


class LostError(Exception):
    """The current call got no response: the child is too slow, has exited or is broken."""


def read_line(line: bytes) -> Any:
    """Return the JSON value of a line. Raises LostError."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise LostError("the rule's process sent something other than a response") from None


def read_ready(line: bytes) -> dict[str, Any]:
    """Return what the process said about its function. Raises LostError."""
    value = read_line(line)
    if isinstance(value, dict) and ("ready" in value or "refused" in value):
        return value
    raise LostError("the rule's process sent something other than a response")


def read_response(line: bytes, expected: Mapping[int, int]) -> tuple[int, list[Result]]:
    """Return the number of a call and its results.

    Args:
        line: as the process sent it.
        expected: number of results by call, of the calls that have no response yet.

    Raises LostError for everything but a complete response to one of these calls.
    """
    match read_line(line):
        case [int(number), [*results]] if expected.get(number) == len(results):
            return number, [_result(result) for result in results]
    raise LostError("the rule's process responded out of order")


def _result(result: object) -> Result:
    """Translate one result. Raises LostError."""
    match result:
        case ["scored", float(value), dict(parts)] if _are_numbers(parts.values()):
            if len(parts) > PARTS:
                reason = f"the rule returned {len(parts)} parts; expected at most {PARTS}"
                return "invalid", Invalid(reason=reason)
            if all(map(_is_name, parts)):
                return "scored", Scored(value=value, parts=parts)
        case [str(status), str(text)] if status in _REASONS:
            reason = clean_line(text)
            if status == "invalid":
                return status, Invalid(reason=reason)
            if status == "skipped":
                return status, Skipped(reason=reason)
            return status, Failed(reason=reason, transient=status == "unreachable")
    text = clean_line(repr(result), 80)
    raise LostError(f"the rule's process sent an unknown result {text}")


def _are_numbers(values: Iterable[object]) -> bool:
    return all(isinstance(value, float) for value in values)


def _is_name(name: str) -> bool:
    return len(name) <= _PART_CHARS and clean_line(name) == name

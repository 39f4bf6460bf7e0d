"""A user's function in the process that runs it: its import, its parameters, its results.

In: module and function, then arguments by name. Out: what its parameters are, and one result per
completion: ("scored", value, parts) or (status, reason), as JSON values.

Imports only the standard library, so that rule_child.py starts quickly.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
import math
import numbers
import os
import re
import traceback
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

REASON_CHARS = 400
"""Limit on an error's text."""
SUBJECTS = {
    "rayhf": ("completion",),
    "trl": ("completions",),
    "verl": ("solution_str",),
    "pairwise": ("first", "second"),
}
"""By style, the parameters that a function must take: what it judges."""
CALLBACKS = ("log_extra", "log_metric")
"""Parameters of TRL's functions that are functions themselves; what they are given is dropped."""
_PART = re.compile(r"[A-Za-z0-9_.-]{1,64}")

Result = tuple[Any, ...]


class RefusedError(Exception):
    """The function cannot be imported or called."""

    def __init__(self, refused: str, **details: object) -> None:
        super().__init__(refused)
        self.response = {"refused": refused, **details}


class UserFunction:
    """The function `name` of a module. Raises RefusedError where it cannot be called.

    `style` is that of its parameters: "pairwise", "rayhf", "trl", "verl", or "" to recognize it.
    """

    def __init__(self, module: str, name: str, style: str) -> None:
        self.module, self.call = _load(module, name)
        self.is_async = _is_async(self.call)
        try:
            parameters = list(inspect.signature(self.call).parameters.values())
        except ValueError:  # a builtin without a signature gets the completion alone
            parameters = [inspect.Parameter("completion", inspect.Parameter.POSITIONAL_ONLY)]
        except TypeError as error:
            raise RefusedError("signature", reason=str(error)) from None
        kinds = [parameter.kind for parameter in parameters]
        self.takes_any = inspect.Parameter.VAR_KEYWORD in kinds
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        named = [parameter for parameter in parameters if parameter.kind not in variable]
        self.names = [parameter.name for parameter in named]
        self.required = [p.name for p in named if p.default is inspect.Parameter.empty]
        self.positional = [p.name for p in named if p.kind == inspect.Parameter.POSITIONAL_ONLY]
        self.style = style or self._style()
        missing = [name for name in SUBJECTS[self.style] if name not in self.names]
        if missing and not self.takes_any:
            reason = f"it has no parameter {missing[0]!r}, only {', '.join(self.names) or 'none'}"
            raise RefusedError("signature", reason=reason, style=self.style)

    def _style(self) -> str:
        for style in ("trl", "verl"):
            if SUBJECTS[style][0] in self.names:
                return style
        return "rayhf"

    def describe(self) -> dict[str, object]:
        """Return what the parent must know to send arguments."""
        return {
            "style": self.style,
            "names": self.names,
            "required": self.required,
            "takes_any": self.takes_any,
            "is_async": self.is_async,
            "checks_answers": hasattr(self.call, "check_reference_answer"),
            "fingerprint": _fingerprint(self.module),
        }

    def bound(self, arguments: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return positional and keyword arguments."""
        if self.style == "trl":
            names = CALLBACKS if self.takes_any else [n for n in CALLBACKS if n in self.names]
            arguments |= {name: _ignore for name in names if name not in arguments}
        return [arguments.pop(name) for name in self.positional if name in arguments], arguments

    def score(self, arguments: dict[str, Any], count: int) -> list[Result]:
        """Call the function for `count` completions; never raises."""
        try:
            positional, named = self.bound(arguments)
            return read_results(self.call(*positional, **named), self.style, count)
        except BaseException as error:  # noqa: BLE001 - foreign code may raise anything, SystemExit too
            return [problem_of(error)] * count

    async def score_async(
        self, arguments: dict[str, Any], count: int, timeout_s: float
    ) -> list[Result]:
        """Call a coroutine function, for `timeout_s` seconds at most; never raises."""
        limit = asyncio.timeout(timeout_s)
        try:
            positional, named = self.bound(arguments)
            async with limit:
                value = await self.call(*positional, **named)
            return read_results(value, self.style, count)
        except BaseException as error:  # noqa: BLE001 - as above
            if limit.expired():
                return [("hung", f"no response within {timeout_s:g} s")] * count
            return [problem_of(error)] * count

    def check_answer(self, answer: str | None) -> str | None:
        """Return why the function cannot use a reference answer; None where it can.

        A function says so by an attribute `check_reference_answer`, which raises.
        """
        check = getattr(self.call, "check_reference_answer", None)
        if check is None:
            return None
        try:
            check(answer)
        except Exception as error:  # noqa: BLE001 - foreign code
            return describe_error(error, place=False)
        return None


def _ignore(*values: object, **named: object) -> None:
    return None


def read_results(value: object, style: str, count: int) -> list[Result]:
    """Return one result per completion from what the function returned."""
    if style != "trl":
        return [_read_result(value)]
    items = _items(value)
    if items is None:
        reason = f"the rule returned {_describe_value(value)}, not a list of {count} numbers"
        return [("invalid", reason)] * count
    if len(items) != count:
        reason = f"the rule returned {len(items)} numbers for {count} completions"
        return [("invalid", reason)] * count
    return [
        ("skipped", "the rule returned None") if item is None else _read_result(item)
        for item in items
    ]


def _items(value: object) -> list[object] | None:
    """Return the elements of a list, a tuple, or a one-dimensional array."""
    if isinstance(value, list | tuple):
        return list(value)
    to_list = getattr(value, "tolist", None)
    listed = to_list() if callable(to_list) else None
    return listed if isinstance(listed, list) else None


def _read_result(value: object) -> Result:
    """Return the result of one completion: a number, or a mapping with `score` and parts."""
    if not isinstance(value, Mapping):
        return _read_number(value, "the rule returned")
    if "score" not in value:
        keys = ", ".join(str(key) for key in value)[:REASON_CHARS]
        return "invalid", f"the rule returned a dict without `score`, only {keys or 'nothing'}"
    result = _read_number(value["score"], "the rule's `score` is")
    if result[0] != "scored":
        return result
    parts = {}
    for key, entry in value.items():
        number = as_number(entry)
        if key == "score" or number is None:
            continue  # verl's functions return texts as well, for logs
        if not (_PART.fullmatch(str(key)) and math.isfinite(number)):
            return "invalid", f"the rule's part {str(key)[:80]!r} is {number}"
        parts[str(key)] = number
    return "scored", result[1], parts


def _read_number(value: object, what: str) -> Result:
    try:
        number = as_number(value)
    except OverflowError:
        return "invalid", f"{what} a number beyond the range of a float"
    if number is None:
        return "invalid", f"{what} {_describe_value(value)}, not a number"
    if not math.isfinite(number):
        return "invalid", f"{what} {number}"
    return "scored", number, {}


def as_number(value: object) -> float | None:
    """Return a number, a truth value or an array of one element as a float; None for others.

    Raises OverflowError for an integer beyond the range of a float.
    """
    if isinstance(value, numbers.Real):  # bool too
        return float(value)
    item = getattr(value, "item", None)  # of numpy and torch
    if not callable(item) or getattr(value, "shape", None) not in ((), (1,)):
        return None
    element = item()
    return float(element) if isinstance(element, numbers.Real) else None


def problem_of(error: BaseException) -> Result:
    """Return the result of a call that raised.

    Statuses, beside hung for a coroutine that did not end: failed, late (failed; an outage where
    every call is), unreachable (failed, and may succeed later), and broken (failed, and the process
    must be restarted).
    """
    if isinstance(error, MemoryError):
        return "broken", describe_error(error)
    if isinstance(error, ConnectionError):
        return "unreachable", describe_error(error)
    if isinstance(error, TimeoutError):
        return "late", describe_error(error)
    return "failed", describe_error(error)


def describe_error(error: BaseException, *, place: bool = True) -> str:
    """Return one line with type, message and the place that raised it.

    Never raises, whatever the error's own __str__ does.
    """
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    if not place:
        return text[:REASON_CHARS]
    where = ""
    last = error.__traceback__
    while last is not None:
        code = last.tb_frame.f_code
        if code.co_filename != __file__ and not code.co_filename.startswith("<"):
            where = f" ({os.path.basename(code.co_filename)}:{last.tb_lineno})"
        last = last.tb_next
    return text[:REASON_CHARS] + where


def _describe_value(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _load(module_name: str, name: str) -> tuple[ModuleType, Callable[..., Any]]:
    """Import the function. Raises RefusedError."""
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # noqa: BLE001 - foreign code runs at import
        # A module that is absent, not one that it imports in turn.
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{error.name}."
        )
        refused = "no module" if absent else "import"
        raise RefusedError(refused, reason=describe_error(error)) from None
    function = getattr(module, name, None)
    if function is None:
        public = [key for key in vars(module) if not key.startswith("_")]
        names = [key for key in public if callable(getattr(module, key))]
        file = getattr(module, "__file__", None) or "built in"
        raise RefusedError("no function", names=names, file=file)
    if not callable(function):
        reason = f"it is a {type(function).__name__}, not a function"
        raise RefusedError("signature", reason=reason)
    return module, function


def _is_async(function: Callable[..., Any]) -> bool:
    call = getattr(function, "__call__", None)  # noqa: B004 - of an object, its method
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _fingerprint(module: ModuleType) -> str:
    """Return the SHA-256 of the module's source file: a restarted process must run the same."""
    file = getattr(module, "__file__", None)
    if file is None:
        return ""
    with open(file, "rb") as source:
        return hashlib.sha256(source.read()).hexdigest()

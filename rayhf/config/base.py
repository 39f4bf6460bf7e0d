"""The strict base of every config section: unknown keys, NaN and infinity are refused."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def _check_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(
            "a name has at most 64 letters, digits, '_', '.' and '-', "
            "and begins with a letter or a digit"
        )
    return text


Name = Annotated[str, AfterValidator(_check_name)]
"""A name chosen in the config. It becomes part of metrics, columns and file names, so it contains
no path separators."""


def expand_path(text: str) -> str:
    """Return a path with `~` and environment variables replaced.

    Raises ValueError for a variable that is not set and for an unknown user.
    """
    expanded = os.path.expandvars(os.path.expanduser(text))
    if expanded.startswith("~"):
        raise ValueError(f"{text}: there is no such user; write ./~ for a name that begins with ~")
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise ValueError(f"{text}: the environment variable {unset[1].strip('{}')} is not set")
    return expanded


class Section(BaseModel):
    """Base of all config sections: immutable, no unknown keys, no NaN or infinity.

    A truth value is no number, and paths may begin with `~` and contain environment variables.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _check_values(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        checked = dict(data)
        for name, value in data.items():
            field = cls.model_fields.get(name)
            if field is None:
                continue
            try:
                checked[name] = _checked(value, set(_plain_types(field.annotation)))
            except ValueError as error:
                problem: InitErrorDetails = {
                    "type": PydanticCustomError("value_error", "{text}", {"text": str(error)}),
                    "loc": (name,),
                    "input": value,
                }
                raise ValidationError.from_exception_data(cls.__name__, [problem]) from None
        return checked


def _checked(value: object, types: set[Any]) -> object:
    """Return a field's value with its path expanded.

    Raises ValueError for a truth value where `types` expect a number, and as `expand_path`.
    """
    if types & {int, float} and bool not in types:
        items = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) for item in items):
            raise ValueError(f"expected a number, got {str(value).lower()}")
    return expand_path(value) if Path in types and isinstance(value, str) else value


def _plain_types(annotation: Any) -> typing.Iterator[Any]:
    """Yield the types that an annotation consists of, those of containers' items included."""
    if isinstance(annotation, type) or not (arguments := typing.get_args(annotation)):
        yield annotation
    elif typing.get_origin(annotation) is not typing.Literal:
        for argument in arguments:
            yield from _plain_types(argument)


class PluginConfig(Section):
    """Settings of a plugin, whose class is found by `type` (rayhf/config/registry.py).

    Subclasses give `type` a default.
    """

    type: str = ""
    """A built-in name, a name that an installed package adds, or package.module:Class."""

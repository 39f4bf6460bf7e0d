"""The strict base of every config section: unknown keys, NaN and infinity are refused."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

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


class Section(BaseModel):
    """Base of all config sections: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class PluginConfig(Section):
    """Settings of a plugin, whose class is found by `type` (rayhf/config/registry.py).

    Subclasses give `type` a default.
    """

    type: str = ""
    """A built-in name, a name that an installed package adds, or package.module:Class."""

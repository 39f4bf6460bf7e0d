"""How a config names a source of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from rayhf.config.base import PluginConfig
from rayhf.config.registry import SOURCES


def _file_of_path(value: object) -> object:
    return {"type": "file", "path": value} if isinstance(value, str | Path) else value


PromptSource = Annotated[PluginConfig, SOURCES, BeforeValidator(_file_of_path)]
"""A path, short for `{type: file, path: ...}`, or the `type` and settings of another source."""

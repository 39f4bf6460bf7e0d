"""Names of models in a config: a directory, or a repository of a hub at a revision.

`ModelName` is the type of every key that names a model. `map_models` replaces the names of a whole
config; the launcher does so once, with names that are pinned to a commit (rayhf/models/hub.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from rayhf.config.base import expand_path

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model directory, or `org/name` or `org/name@revision` on a hub.

    A name that begins with `.`, `/` or `~`, or has not exactly one `/` before its revision, is a
    path. Any other is a path where such a directory exists, and a hub name elsewhere.
    """

    text: str

    @property
    def repository(self) -> str | None:
        """`org/name` where this can be a hub name; None where it can only be a path."""
        repository = self.text.partition("@")[0]
        return repository if _REPOSITORY.fullmatch(repository) else None

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit of a hub name; None is its default branch."""
        return self.text.partition("@")[2] or None if self.repository else None

    @property
    def commit(self) -> str | None:
        """The revision, where it is a commit: the name then means the same model forever."""
        revision = self.revision
        return revision if revision and _COMMIT.fullmatch(revision) else None

    def at(self, commit: str) -> ModelName:
        """Return this hub name, pinned to a commit."""
        return ModelName(f"{self.repository}@{commit}")

    def below(self, base: Path) -> ModelName:
        """Return the path below `base`, or the same name where it is pinned to a commit."""
        return self if self.commit else ModelName(str(base / self.text))

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, value: object) -> ModelName:
        """Return the name of a config value. Raises ValueError for what cannot name a model."""
        if isinstance(value, ModelName):
            return value
        if not isinstance(value, str | Path) or not str(value).strip():
            raise ValueError(
                f"expected a model directory or a hub name such as Qwen/Qwen3-0.6B, got {value!r}"
            )
        name = cls(expand_path(str(value)))
        if name.repository and name.text.endswith("@"):
            raise ValueError(f"{value}: expected a branch, tag or commit after '@'")
        return name

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse,
            json_schema_input_schema=core_schema.str_schema(),
            serialization=core_schema.to_string_ser_schema(),
        )


def map_models(value: T, replace: Callable[[str, ModelName], ModelName], key: str = "") -> T:
    """Return a config with every model name in it replaced.

    Args:
        value: a section, or any value in one.
        replace: called with a name's key, for example "scorer.train[0].model", and the name.
        key: where `value` stands.
    """
    mapped: Any = value
    if isinstance(value, ModelName):
        mapped = replace(key, value)
    elif isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        prefix = f"{key}." if key else ""
        new = {name: map_models(item, replace, prefix + name) for name, item in fields.items()}
        changed = {name: item for name, item in new.items() if item is not fields[name]}
        mapped = value.model_copy(update=changed) if changed else value
    elif isinstance(value, tuple):
        items = tuple(
            map_models(item, replace, f"{key}[{index}]") for index, item in enumerate(value)
        )
        mapped = value if all(a is b for a, b in zip(items, value, strict=True)) else items
    elif isinstance(value, dict):
        entries = {name: map_models(item, replace, f"{key}.{name}") for name, item in value.items()}
        mapped = value if all(entries[name] is value[name] for name in value) else entries
    return cast(T, mapped)

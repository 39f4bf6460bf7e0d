"""How a config names sources of prompts: the keys that all have, and the short forms."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt

from rayhf.config.base import Name, PluginConfig
from rayhf.config.registry import SOURCES

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_DATA_FILE = re.compile(r".*\.(jsonl?|ndjson|csv|tsv|parquet|arrow)(\.gz|\.zst)?", re.IGNORECASE)


def as_list(value: object) -> object:
    """Return a list of one for a single value."""
    return value if isinstance(value, list | tuple) else [value]


StringOrList = Annotated[
    tuple[str, ...], BeforeValidator(as_list, json_schema_input_type=str | tuple[str, ...])
]
"""Strings; a single one stands for a list of one."""


class SourceConfig(PluginConfig):
    """Keys that every source of prompts has.

    A row passes `drop`, `rename`, `filter`, `limit` and `template`, in this order.
    """

    name: Name | None = None
    """Name in metrics and samples. Default: derived from its path, data set or task."""
    weight: PositiveFloat = 1.0
    """Share of this source in every iteration's prompts, relative to the other sources' weights."""
    limit: PositiveInt | None = None
    """Maximum number of rows; the first ones are taken."""
    filter: str | None = None
    """Jinja expression over the columns that is true for the rows to take, for example
    "level in ['4', '5'] and answer is not none". A column whose name is no identifier is
    `row['its name']`."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Columns to rename, {question: prompt, solution: answer}. A dotted path copies a value from
    inside a column: {reward_model.ground_truth: answer}."""
    drop: StringOrList = ()
    """Columns to leave out, for example images."""
    template: str | None = None
    """Jinja template over the columns that makes the user message, for example
    "{{ question }} Be brief."; no column `prompt` or `messages` is needed."""
    scorers: Annotated[StringOrList, Field(min_length=1)] | None = None
    """Names of the scorers that judge its rows; a row's own column `scorers` goes first. Default:
    all scorers."""
    drop_last_assistant: bool = False
    """Cut the assistant turn at the end of conversations, which are refused otherwise: the policy
    is to write that turn."""

    @property
    def default_name(self) -> str:
        """Name where the config gives none; need not be a valid or a unique one."""
        return self.type.rpartition(":")[2]


def _of_string(value: object) -> object:
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    is_hub = _HUB_NAME.fullmatch(value) and not _DATA_FILE.fullmatch(value)
    if is_hub and not Path(value).exists():
        return {"type": "hub", "dataset": value}
    return {"type": "file", "path": value}


PromptSource = Annotated[
    SourceConfig,
    SOURCES,
    BeforeValidator(_of_string, json_schema_input_type=str | Annotated[SourceConfig, SOURCES]),
]
"""A path, a hub data set's name, or the `type` and settings of a source."""


def source_names(sources: tuple[SourceConfig, ...]) -> tuple[str, ...]:
    """Return a different, valid name for each source: its own, or one derived from its settings."""
    names: list[str] = []
    given = [source.name for source in sources if source.name is not None]
    for source in sources:
        if source.name is not None:
            names.append(source.name)
            continue
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", source.default_name).strip("_.-")[:56] or "source"
        taken = {*names, *given}
        numbered = (f"{plain}_{number}" for number in range(2, len(sources) + 2))
        names.append(plain if plain not in taken else next(n for n in numbered if n not in taken))
    return tuple(names)


def _check_names(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
    given = [source.name for source in sources if source.name is not None]
    for name in given:
        if given.count(name) > 1:
            raise ValueError(f"several sources are named {name!r}; expected different names")
    return sources


PromptSources = Annotated[
    tuple[PromptSource, ...],
    BeforeValidator(as_list, json_schema_input_type=PromptSource | tuple[PromptSource, ...]),
    Field(min_length=1),
    AfterValidator(_check_names),
]
"""One source, or a list of them that is mixed by weight."""

"""YAML file + dotted overrides -> a config, or a ConfigError of one line that names the key and the
nearest valid one."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rayhf.config.schema import CampaignConfig
from rayhf.errors import ConfigError

S = TypeVar("S", bound=BaseModel)


def load_config(path: Path, overrides: Sequence[str] = ()) -> CampaignConfig:
    """A campaign's config."""
    return load_section(path, overrides, CampaignConfig)


def load_section(path: Path, overrides: Sequence[str], root: type[S]) -> S:
    """Read `path`, apply `key=value` overrides (values are YAML), and validate as `root`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = [str(p) for p in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
        raise ConfigError(f"config {path}: no such file{_nearest(str(path), known)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: cannot be read ({error})") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"config {path}{where}: not valid YAML ({getattr(error, 'problem', error)})"
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"config {path}: expected a mapping of sections, got {type(data).__name__}"
        )
    for override in overrides:
        _apply(data, override)
    return _validate(data, str(path), root)


def validate(data: dict[str, Any], *, source: str) -> CampaignConfig:
    return _validate(data, source, CampaignConfig)


def _validate(data: dict[str, Any], source: str, root: type[S]) -> S:
    try:
        return root.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"config {source}: {_describe(error, root)}") from None


def dump_config(config: CampaignConfig) -> str:
    """The resolved config as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, for example learner.lr=1e-6")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = data
    for depth, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[: depth + 1]), create=True)
    if isinstance(node, list):
        _child(node, last, key, create=False)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override {'.'.join(parents)}: {node!r} is a value, not a section")


def _child(node: Any, part: str, where: str, *, create: bool) -> Any:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise ConfigError(
                f"override {where}: expected an index from 0 to {len(node) - 1}, got {part!r}"
            )
        return node[int(part)]
    if not isinstance(node, dict):
        raise ConfigError(f"override {where}: {node!r} is a value, not a section")
    if create and node.get(part) is None:
        node[part] = {}
    return node[part]


def _describe(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem in full, and how many more there are."""
    problems = error.errors(include_url=False)
    # A misspelled key usually also leaves a required one missing: the misspelling is the cause, so it
    # is shown first.
    problems.sort(key=lambda p: p["type"] != "extra_forbidden")
    first = problems[0]
    location = [part for part in first["loc"] if not _is_tag(part, first["loc"], root)]
    key = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        valid = _valid_keys(first["loc"][:-1], root)
        text = f"unknown key {key}{_nearest(str(first['loc'][-1]), valid)}"
    elif first["type"] == "missing":
        text = f"{key} is missing"
    else:
        text = f"{key}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {_short(first['input'])}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return " ".join((text + more).split())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest(word: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; valid: {', '.join(valid)}" if valid else ""


def _models(annotation: Any) -> dict[str | None, type[BaseModel]]:
    """The sections an annotation can hold, by their `type` tag (None where there is just one)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        tag = annotation.model_fields.get("type")
        return {tag.default if tag else None: annotation}
    found: dict[str | None, type[BaseModel]] = {}
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for argument in typing.get_args(annotation):
            found.update(_models(argument))
    return found


def _walk(loc: Sequence[str | int], root: type[BaseModel]) -> dict[str | None, type[BaseModel]]:
    """The sections a location of an error leads to."""
    models: dict[str | None, type[BaseModel]] = {None: root}
    for part in loc:
        if isinstance(part, int):
            continue
        if part in models and part is not None:
            models = {part: models[part]}
            continue
        nested: dict[str | None, type[BaseModel]] = {}
        for model in models.values():
            if part in model.model_fields:
                nested.update(_models(model.model_fields[part].annotation))
        models = nested
    return models


def _valid_keys(loc: Sequence[str | int], root: type[BaseModel]) -> list[str]:
    return sorted({name for model in _walk(loc, root).values() for name in model.model_fields})


def _is_tag(part: str | int, loc: Sequence[str | int], root: type[BaseModel]) -> bool:
    """pydantic puts a union's tag into the location; users wrote no such key."""
    position = list(loc).index(part)
    before = loc[:position]
    return (
        isinstance(part, str)
        and position > 0
        and part in _walk(before, root)
        and part not in _valid_keys(before, root)
    )

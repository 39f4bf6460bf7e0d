"""Load configs from a YAML file and dotted overrides.

Out: a validated config, or a ConfigError of one line that names every wrong key and the nearest
valid one.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rayhf.config.base import expand_path
from rayhf.config.registry import Registry
from rayhf.config.schema import CampaignConfig
from rayhf.config.yaml_text import dump_yaml, parse_yaml
from rayhf.errors import ConfigError, listed, nearest

S = TypeVar("S", bound=BaseModel)

_NAMES_ELSEWHERE = {
    "batch_size": "batch",
    "gpu_memory_utilization": "memory_fraction",
    "gradient_checkpointing": "activation_checkpointing",
    "group_size": "samples",
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "max_completion_length": "max_tokens",
    "max_grad_norm": "grad_clip",
    "mini_batch_size": "prompts_per_step",
    "num_generations": "samples",
    "num_train_epochs": "epochs",
    "rollout_n": "samples",
    "train_batch_size": "batch",
    "warmup_ratio": "warmup",
}
"""What transformers, TRL, verl and vLLM call our keys, where the spelling does not tell."""


def load_config(
    source: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()
) -> CampaignConfig:
    """Read a campaign's config.

    Args:
        source: a YAML file, or its content as a mapping.
        overrides: `key=value` with dotted keys and YAML values, for example "learner.lr=1e-6".

    Raises ConfigError of one line that names the key and the nearest valid one.
    """
    return load_section(source, overrides, CampaignConfig)


def load_section(
    source: Path | str | Mapping[str, Any], overrides: Sequence[str], root: type[S]
) -> S:
    """Read a config as `root`; see `load_config`. Raises ConfigError."""
    name = "mapping" if isinstance(source, Mapping) else str(source)
    return _validate(_overridden(source, overrides), name, root)


def existing_run(source: Path | str, overrides: Sequence[str]) -> Path | None:
    """Return a config's run directory where it exists, without looking at other settings.

    Validating all of a config imports the modules of its algorithm and its scorers, which takes
    seconds. Raises ConfigError where the file is no YAML.
    """
    run = _overridden(source, overrides).get("run")
    directory = run.get("dir") if isinstance(run, dict) else None
    if not isinstance(directory, str):
        return None
    with suppress(ValueError):  # which validation names
        path = Path(expand_path(directory))
        return path if path.is_dir() else None
    return None


def _overridden(source: Path | str | Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    data = deepcopy(dict(source)) if isinstance(source, Mapping) else read_mapping(Path(source))
    for override in overrides:
        _apply(data, override)
    return data


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file of sections, not validated. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = [str(p) for p in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
        raise ConfigError(f"config {path}: no such file{nearest(str(path), known)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: cannot be read ({error})") from None
    try:
        data = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"config {path}: not valid YAML ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"config {path}: expected a mapping of sections, got {type(data).__name__}"
        )
    return data


def _validate(data: dict[str, Any], source: str, root: type[S]) -> S:
    try:
        return root.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"config {source}: {_describe(error, root, data)}") from None


def dump_config(config: CampaignConfig) -> str:
    """Return the resolved config as YAML that `load_config` reads back."""
    return dump_yaml(config.model_dump(mode="json"))


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, for example learner.lr=1e-6")
    try:
        value = _override_value(text)
    except ValueError as error:
        raise ConfigError(
            f"override {_short(override)}: the value is not valid YAML ({error})"
        ) from None
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


def _override_value(text: str) -> Any:
    """Return the value of an override. Raises ValueError where it is not valid YAML.

    A "#" begins no comment: `run.dir=runs/a #1` names a directory.
    """
    structured = text.lstrip().startswith(("[", "{", '"', "'")) or ": " in text
    return text if "#" in text and not structured else parse_yaml(text)


def _child(node: Any, part: str, where: str, *, create: bool) -> Any:
    if isinstance(node, list):
        if not re.fullmatch("[0-9]{1,6}", part) or int(part) >= len(node):
            raise ConfigError(
                f"override {where}: expected an index from 0 to {len(node) - 1}, got {part!r}"
            )
        return node[int(part)]
    if not isinstance(node, dict):
        raise ConfigError(f"override {where}: {node!r} is a value, not a section")
    if create and node.get(part) is None:
        node[part] = {}
    if create and isinstance(node[part], str):  # `loss: ipo` is short for `loss: {type: ipo}`
        node[part] = {"type": node[part]}
    return node[part]


def _describe(error: ValidationError, root: type[BaseModel], data: object) -> str:
    """Return the problems as one line; several of one key are one problem."""
    problems = error.errors(include_url=False)
    # A misspelled key often also leaves a required one missing: the misspelling is the cause, so it
    # is shown first.
    problems.sort(key=lambda p: p["type"] != "extra_forbidden")
    by_key: dict[str, list[ErrorDetails]] = {}
    places: dict[str, tuple[str, type[BaseModel] | None]] = {}
    for problem in problems:
        location, section = _locate(problem["loc"], root, data)
        key = ".".join(map(str, location))
        by_key.setdefault(key, []).append(problem)
        places.setdefault(key, (str(location[-1]) if location else "", section))
    # A wrong item also leaves its list too short: what contains another problem is no further one.
    causes = [key for key in by_key if not any(each.startswith(f"{key}.") for each in by_key)]
    texts = [_problem(key, by_key[key], *places[key]) for key in causes]
    return " ".join(listed(texts).split())


def _problem(
    key: str, problems: Sequence[ErrorDetails], name: str, section: type[BaseModel] | None
) -> str:
    """Return what is wrong with a key.

    Args:
        key: dotted.
        problems: of the key; several where a value fits no member of a union.
        name: last part of the key.
        section: the section that has or lacks it.
    """
    first = problems[0]
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        valid = sorted(section.model_fields) if section else []
        ours = _NAMES_ELSEWHERE.get(name)
        hint = f"; did you mean {ours}?" if ours in valid else nearest(name, valid)
        return f"unknown key {key}{hint}"
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "plugin":
        inner = first["ctx"]["key"]
        return f"{key}{f'.{inner}' if inner else ''}: {message}"
    if first["type"] == "value_error":  # one of our own checks: its message is complete
        return f"{key}: {message.removeprefix('Value error, ')}".removeprefix(": ")
    others = [p["msg"].removeprefix("Input should be ") for p in problems[1:]]
    expected = " or ".join(dict.fromkeys([f"{message[:1].lower()}{message[1:]}", *others]))
    return f"{key}: {expected}, got {_short(first['input'])}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _locate(
    loc: Sequence[str | int], root: type[BaseModel], data: object
) -> tuple[list[str | int], type[BaseModel] | None]:
    """Follow an error's location through the data.

    Returns the location as the user wrote it (pydantic adds the tags of unions to it), and the
    section that holds its last key: None where that is in a plain mapping.
    """
    written: list[str | int] = []
    section: type[BaseModel] | None = root
    inside: list[Any] = []
    """Possible types of the value at the current location, where that is not one section."""
    for position, part in enumerate(loc):
        if section is None and part in (tags := _tags(inside)):
            section = tags[str(part)]
            continue
        if isinstance(part, int) and data is not None and not isinstance(data, list | tuple):
            # A single item that stands for a list of one: the user wrote no index.
            inside = [piece for kind in inside for piece in _items(kind)]
            section = _section_of(inside, data)
            continue
        is_last = position == len(loc) - 1
        if is_last and section is None and isinstance(data, str | int | float):
            break  # the name of a union's member: a plain value has no keys
        written.append(part)
        if is_last:
            break
        if section is not None:
            field = section.model_fields.get(str(part))
            inside = [] if field is None else [*_parts(field.annotation), *field.metadata]
        else:  # an item of a container: a tuple or a mapping
            inside = [piece for kind in inside for piece in _items(kind)]
        data = _item(data, part)
        section = _section_of(inside, data)
    return written, section


def _item(data: object, part: str | int) -> object:
    if isinstance(data, Mapping):
        return data.get(part)
    if isinstance(data, Sequence) and not isinstance(data, str) and isinstance(part, int):
        return data[part] if part < len(data) else None
    return None


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union and the metadata of annotated types, not items of containers."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from annotation.__metadata__
        yield from _parts(annotation.__origin__)
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _parts(member)
    else:
        yield annotation


def _items(kind: Any) -> Iterator[Any]:
    """Yield the possible types of a container's items."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        yield from _parts(arguments[1])
    elif typing.get_origin(kind) in (tuple, list):
        yield from _parts(arguments[0])


def _tags(candidates: Iterable[Any]) -> dict[str, type[BaseModel]]:
    """Return the sections among `candidates` by the default of their `type`."""
    sections = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
    return {
        str(section.model_fields["type"].default): section
        for section in sections
        if "type" in section.model_fields
    }


def _section_of(candidates: Sequence[Any], data: object) -> type[BaseModel] | None:
    """Return the section that `data` was validated as, where there is only one candidate."""
    for candidate in candidates:
        if not isinstance(candidate, Registry):
            continue
        name = data.get("type", candidate.default) if isinstance(data, Mapping) else data
        if isinstance(name, str):
            with suppress(ValueError):  # an unknown type is reported as such, not as a key
                return candidate.config_type(name)
    sections = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
    return sections[0] if len(sections) == 1 and isinstance(data, Mapping) else None

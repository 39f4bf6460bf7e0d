"""YAML 1.2 text to plain values and back, strict and bounded.

YAML 1.2 means: `yes`, `off` and `1:30` are strings and `010` is ten. A key that stands twice, a
document nested too deeply and aliases that multiply into a huge document are refused.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML, MappingNode, Node
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError

MAX_CHARACTERS = 1 << 18
"""Longest document: reading a list of so many characters takes five seconds."""
MAX_VALUES = 100_000
"""Most values of a document, each alias counted as the values it stands for."""


class _Constructor(SafeConstructor):
    """Constructs plain values; a repeated key is an error that names both lines."""

    def check_mapping_key(
        self, node: Node, key_node: Node, mapping: Mapping[Any, Any], key: Any, value: Any
    ) -> bool:
        """Return whether the key is new. Raises MarkedYAMLError naming the lines otherwise."""
        if key not in mapping:
            return True
        assert isinstance(node, MappingNode)
        first = next(k for k, _ in node.value if k.value == key_node.value)
        raise MarkedYAMLError(
            problem=f"key {key!r} stands twice, first in line {first.start_mark.line + 1}",
            problem_mark=key_node.start_mark,
        )

    def flatten_mapping(self, node: Any) -> Any:
        """Merge what `<<` names. Raises MarkedYAMLError where that makes a huge mapping."""
        merged = super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise MarkedYAMLError(
                problem=f"merges more than {MAX_VALUES:,} values", problem_mark=node.start_mark
            )
        return merged


# YAML 1.2 has no dates.
_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def parse_yaml(text: str) -> Any:
    """Return the value of one YAML document.

    Raises ValueError of one line, which begins with the position where one is known.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{len(text):,} characters; expected at most {MAX_CHARACTERS:,}")
    reader = YAML(typ="safe", pure=True)
    reader.Constructor = _Constructor
    try:
        value = reader.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _count(value, {}, 0)
    return value


def _count(value: object, counts: dict[int, int], depth: int) -> int:
    """Return how many values `value` stands for. Raises ValueError above MAX_VALUES."""
    if not isinstance(value, dict | list):
        return 1
    if depth > 100:
        raise ValueError("nested more than 100 levels deep")
    if (known := counts.get(id(value))) is not None:
        return known
    items = value.values() if isinstance(value, dict) else value
    count = 1 + sum(_count(item, counts, depth + 1) for item in items)
    if count > MAX_VALUES:
        raise ValueError(f"stands for more than {MAX_VALUES:,} values, counting aliases")
    counts[id(value)] = count
    return count


def dump_yaml(value: Mapping[str, Any]) -> str:
    """Return YAML text that `parse_yaml` reads back as `value`; keys stay in order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
    yaml.width = 100
    text = io.StringIO()
    yaml.dump(value, text)
    return text.getvalue()

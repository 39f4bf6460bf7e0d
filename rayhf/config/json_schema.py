"""JSON schema of a config file, for editors.

A plugin's settings are one alternative for each built-in or installed plugin, told apart by `type`;
a class of the user's own (`package.module:Class`) may have any settings. Unlike reading a config,
making the schema imports every plugin.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from rayhf.config.base import PluginConfig
from rayhf.config.registry import PLUGIN_FIELD, Registry

_OWN_CLASS = {"type": "string", "pattern": "^[A-Za-z_][\\w.]*:[A-Za-z_]\\w*$"}


class _Generator(GenerateJsonSchema):
    """Generator that knows the fields which a registry validates."""

    def function_plain_schema(
        self, schema: core_schema.PlainValidatorFunctionSchema
    ) -> JsonSchemaValue:
        """Return the alternatives of a plugin field."""
        plugin = (schema.get("metadata") or {}).get(PLUGIN_FIELD)
        if plugin is None:
            return super().function_plain_schema(schema)
        registry, family = plugin
        return self._alternatives(registry, family)

    def _alternatives(self, registry: Registry, family: type[PluginConfig]) -> JsonSchemaValue:
        names = []
        alternatives: list[JsonSchemaValue] = []
        for entry in registry.entries():
            config = registry.config_type(entry.name)
            if not issubclass(config, family):
                continue
            names.append(entry.name)
            chosen: JsonSchemaValue = {"properties": {"type": {"const": entry.name}}}
            if entry.name != registry.default:
                chosen["required"] = ["type"]
            settings = self.generate_inner(config.__pydantic_core_schema__)
            alternatives.append({"title": entry.name, "allOf": [settings, chosen]})
        own = {"type": "object", "properties": {"type": _OWN_CLASS}, "required": ["type"]}
        return {
            "oneOf": [
                *alternatives,
                {"title": "class of your own", **own},
                {"title": "name alone", "anyOf": [{"enum": names}, _OWN_CLASS]},
            ]
        }


def json_schema(root: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a config file whose class is `root`."""
    schema = root.model_json_schema(schema_generator=_Generator)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

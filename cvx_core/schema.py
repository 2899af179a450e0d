"""A JSON Schema of recipes, generated from the registered configs, for completion in editors."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from cvx_core.config import Config
from cvx_core.nesting import inner_configs
from cvx_core.registry import Component, Registry
from cvx_core.run_config import RunConfig
from cvx_core.spec import SECTIONS, WEIGHTED


class _Generator(GenerateJsonSchema):
    """Leaves nested components open here; their property is replaced by a reference to their kind."""

    def is_instance_schema(self, schema: core_schema.IsInstanceSchema) -> JsonSchemaValue:
        return {}


def schema(registry: Registry) -> dict[str, Any]:
    """Return the schema of a recipe file for the components of a registry."""
    definitions = {
        kind: {"anyOf": [_component(c) for c, _ in registry.all(kind) if c.config is not None]}
        for kind in (*SECTIONS, "strategy", "format", "tracker")
    }
    run = _fields(RunConfig)
    properties: dict[str, Any] = {**run["properties"], "model": {"type": "string"}}
    properties |= {section: {"$ref": f"#/$defs/{section}"} for section in SECTIONS}
    properties["adapters"] = {"type": "array", "items": {"$ref": "#/$defs/adapter"}}
    properties["parallel"] = {"type": "array", "items": {"$ref": "#/$defs/strategy"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "cvx recipe",
        "type": "object",
        "properties": properties,
        "required": ["task"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def _component(component: Component) -> dict[str, Any]:
    assert component.config is not None
    fields = _fields(component.config)
    properties = {"use": {"const": component.name, "description": component.summary}, **fields["properties"]}
    if component.kind in WEIGHTED:
        properties["weights"] = {"$ref": "#/$defs/format"}
    for name, value in component.preset.items():
        if isinstance(properties.get(name), dict):
            properties[name] = {**properties[name], "default": value}
    return {"type": "object", "properties": properties, "required": ["use"], "additionalProperties": False}


def _fields(config: type[Config]) -> dict[str, Any]:
    """Return a config's object schema with its inner definitions written out in place."""
    raw = config.model_json_schema(schema_generator=_Generator)
    inner = raw.pop("$defs", {})
    properties = {name: _inline(value, inner) for name, value in raw.get("properties", {}).items()}
    properties |= {name: {"$ref": f"#/$defs/{kind}"} for name, kind in config.nested.items()}
    for name, kind in config.listed.items():
        properties[name] |= {"type": "array", "items": {"$ref": f"#/$defs/{kind}"}}
    for name, model in inner_configs(config).items():
        own = {"type": "object", **_fields(model), "additionalProperties": False}
        properties[name] = {"description": properties[name]["description"], "anyOf": [own, {"type": "null"}]}
    return {"properties": properties}


def _inline(value: Any, inner: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_inline(item, inner) for item in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        target = inner[value["$ref"].rsplit("/", 1)[1]]
        return _inline({**target, **{k: v for k, v in value.items() if k != "$ref"}}, inner)
    return {key: _inline(item, inner) for key, item in value.items()}

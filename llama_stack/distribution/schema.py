"""The JSON Schema of distributions, with the configuration of every installed provider in it, for editors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ..apis.config import Config
from ..registry import Installed, Registry
from .models import Distribution, FaceEntry, MiddlewareEntry, ProviderEntry, ToolEntry

_VARIABLE = {"type": "string", "pattern": r"\$\{env\.[A-Za-z_][A-Za-z0-9_]*(:[^}]*)?\}"}

# what makes a schema too narrow for the text of a variable
_NARROW_TYPES = ("integer", "number", "boolean")
_NARROW_KEYS = ("pattern", "enum", "const", "format", "minLength", "maxLength")


def json_schema(registry: Registry) -> dict[str, Any]:
    """The schema of a distribution's file (JSON Schema 2020-12). Loads every plugin that the registry admits.

    Where a value has a form, the schema also takes ``${env.NAME}``; what the variable holds is checked at the start.
    Keys that ``extends:`` may bring from another file are not required.
    """
    providers = registry.providers()
    tools, faces, middlewares = registry.tools(), registry.faces(), registry.middlewares()
    installed: list[Installed[Any]] = [*providers, *tools, *faces, *middlewares]
    configs = [found.spec.config for found in installed]
    entry_models = (ProviderEntry, ToolEntry, FaceEntry, MiddlewareEntry)
    models: list[type[BaseModel]] = [Distribution, *entry_models, *dict.fromkeys(configs)]
    references, schema = models_json_schema([(model, "validation") for model in models], title="Distribution")
    definitions: dict[str, Any] = schema["$defs"]
    name_of = {model: references[model, "validation"]["$ref"].rpartition("/")[2] for model in models}

    def entries(entry: type[BaseModel], key: str, found: Iterable[tuple[str, str, type[Config]]]) -> dict[str, Any]:
        plain = definitions[name_of[entry]]
        return {"type": "array", "items": {"anyOf": [_entry(plain, key, *one, definitions, name_of) for one in found]}}

    by_api: dict[str, list[tuple[str, str, type[Config]]]] = {found.spec.name: [] for found in registry.apis()}
    for provider in providers:
        by_api[provider.spec.api.name].append((provider.spec.name, provider.spec.description, provider.spec.config))
    root = dict(definitions[name_of[Distribution]])
    root["properties"] = properties = dict(root["properties"])
    properties["providers"] = {
        "description": properties["providers"]["description"],
        "type": "object",
        "properties": {api: entries(ProviderEntry, "provider", found) for api, found in by_api.items() if found},
        "additionalProperties": False,
    }
    for section, entry, key, declared in (
        ("tools", ToolEntry, "tool", tools),
        ("faces", FaceEntry, "face", faces),
        ("middleware", MiddlewareEntry, "middleware", middlewares),
    ):
        named = [(found.spec.name, found.spec.description, found.spec.config) for found in declared]
        if named:
            properties[section] = {"description": properties[section]["description"]} | entries(entry, key, named)
    for replaced in (Distribution, ProviderEntry):
        definitions.pop(name_of[replaced])
    for own in ("version", "name", "extends"):
        root["properties"][own] = {"x-literal": True} | root["properties"][own]
    whole: dict[str, Any] = _or_variable(root | {"$defs": definitions})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | whole


def _entry(
    plain: Mapping[str, Any],
    key: str,
    name: str,
    description: str,
    config: type[Config],
    definitions: Mapping[str, Any],
    name_of: Mapping[type[BaseModel], str],
) -> dict[str, Any]:
    required = [key]
    if definitions[name_of[config]].get("required"):
        required.append("config")
    named = {"const": name} | ({"description": description} if description else {})
    properties = plain["properties"] | {key: named, "config": {"$ref": f"#/$defs/{name_of[config]}"}}
    return dict(plain) | {"title": name, "properties": properties, "required": required}


def _or_variable(schema: Any) -> Any:
    """The schema, with every value in it that has a form also allowed to be the text of a variable."""
    if isinstance(schema, list):
        return [_or_variable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.pop("x-literal", False):
        return schema
    widened = {key: _widened_members(key, value) for key, value in schema.items()}
    is_text = widened.get("type") == "string" or "const" in widened or "enum" in widened
    if widened.get("type") in _NARROW_TYPES or (is_text and any(key in widened for key in _NARROW_KEYS)):
        kept = {key: widened.pop(key) for key in ("title", "description", "default") if key in widened}
        return kept | {"anyOf": [widened, _VARIABLE]}
    return widened


def _widened_members(key: str, value: Any) -> Any:
    if key in ("properties", "patternProperties", "$defs"):
        return {name: _or_variable(member) for name, member in value.items()}
    if key in ("items", "additionalProperties", "anyOf", "oneOf", "allOf", "prefixItems"):
        return _or_variable(value)
    return value

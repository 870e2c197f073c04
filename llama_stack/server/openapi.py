"""The published documents, derived from the contracts: the draft's operations in one, all that goes beyond in another.

``draft_document`` equals the draft's own file but for the differences that docs/openapi.md lists with their reasons.
``extension_document`` holds the operations that the draft lacks, and every schema in full: limits, optional fields and
further reply forms. A schema is pydantic's, finished here: how the draft words a field, and which fields are ours,
stands on the field itself (``draft``, ``EXTENSION`` and ``ANY_OF`` in ``apis/common.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import cache
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import DEFAULT_REF_TEMPLATE, GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from ..apis import DRAFT_APIS, Api, Operation, Parameter, Shape, contract_of, operations
from ..apis.common import Schema

Json = dict[str, Any]

DRAFT_TITLE = "[DRAFT] Llama Stack Specification"
DRAFT_VERSION = "0.0.1"
DIALECT = "https://json-schema.org/draft/2020-12/schema"

_COMPONENT = "#/components/schemas/"
_LIMITS = frozenset(
    [
        *("minLength", "maxLength", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        *("multipleOf", "minItems", "maxItems", "minProperties", "maxProperties", "propertyNames", "patternProperties"),
    ]
)

_PROBLEM_PARTS: dict[str, Json] = {
    "Problem": {
        "title": "Problem",
        "description": "Every answer but a success: an RFC 9457 problem document that OpenAI clients can read.",
        "type": "object",
        "required": ["type", "title", "status", "detail", "instance", "error"],
        "properties": {
            "type": {"type": "string", "description": "The kind of error: urn:llama-stack:error: and its code."},
            "title": {"type": "string", "description": "The kind of error, in words."},
            "status": {"type": "integer", "description": "The HTTP status."},
            "detail": {"type": "string", "description": "What was wrong, where, and what would be right."},
            "instance": {"type": "string", "description": "This very request: urn:request: and the X-Request-Id."},
            "errors": {
                "type": "array",
                "description": "Each fault of the request.",
                "items": {"$ref": _COMPONENT + "ProblemFault"},
            },
            "error": {"$ref": _COMPONENT + "ProblemError"},
        },
    },
    "ProblemFault": {
        "title": "Problem fault",
        "description": "One fault in one part of a request.",
        "type": "object",
        "required": ["pointer", "code", "detail"],
        "properties": {
            "pointer": {"type": "string", "description": "An RFC 6901 pointer into the body, or ? and a parameter."},
            "code": {"type": "string", "description": "The kind of fault."},
            "detail": {"type": "string", "description": "What was wrong, and what would be right."},
            "limit": {"type": "number", "description": "The limit that was passed."},
        },
    },
    "ProblemError": {
        "title": "Problem error",
        "description": "The same error in OpenAI's form.",
        "type": "object",
        "required": ["message", "type", "code", "param"],
        "properties": {
            "message": {"type": "string", "description": "The detail."},
            "type": {"type": "string", "description": "OpenAI's kind of error, such as invalid_request_error."},
            "code": {"type": "string", "description": "Our kind of error, such as model_not_found."},
            "param": {"type": ["string", "null"], "description": "The field or parameter at fault."},
        },
    },
}
"""The schemas of an error, as RELIABILITY section 4 settles it; further members may come with single codes."""


def draft_document() -> Json:
    """The OpenAPI 3.1 document of the draft's operations, worded as the draft words them."""
    found = [operation for operation in _operations(DRAFT_APIS) if _is_draft(operation)]
    schemas = _Schemas(found, _DraftSchema, _in_draft_words)
    paths: Json = {}
    for operation in found:
        described = _described(operation, schemas)
        described["parameters"] = [
            _query(p, schemas, operation) for p in operation.query.values() if not p.is_extension
        ]
        described["responses"] = _responses(_draft_reply(operation, schemas))
        paths.setdefault(operation.path, {})[operation.method.lower()] = described
    components = schemas.reached_from(paths)
    tags = sorted({operation.api.tag for operation in found})
    types = sorted(components)
    return {
        "openapi": "3.1.0",
        "jsonSchemaDialect": DIALECT,
        "info": {"title": DRAFT_TITLE, "version": DRAFT_VERSION, "description": _DRAFT_DESCRIPTION},
        "servers": [{"url": "/", "description": "The server that this document came from."}],
        "paths": paths,
        "components": {"responses": {}, "schemas": components | _PROBLEM_PARTS},
        "tags": [{"name": tag, "description": _tag_description(tag, found)} for tag in tags]
        + [{"name": name, "description": f'<SchemaDefinition schemaRef="{_COMPONENT}{name}" />'} for name in types],
        "x-tagGroups": [{"name": "Operations", "tags": tags}, {"name": "Types", "tags": types}],
    }


def extension_document(apis: Iterable[type[Api]], faces: Iterable[Json] = ()) -> Json:
    """The OpenAPI 3.1 document of what these APIs have beyond the draft, with every schema in full.

    It lists the extension operations, the operations of APIs that plugins bring, and the draft operations that have
    gained a parameter; the full schemas of all draft operations are among its components. ``faces`` are the OpenAPI
    documents of routes that no contract declares (faces, health, metrics): their paths and schemas are taken over.
    """
    document = deepcopy(_beyond_the_draft(tuple(contract_of(api) for api in apis)))
    named = document["components"]["schemas"]
    for face in faces:
        face = _beside(named, face)
        document["paths"] |= face.get("paths", {})
        named |= face.get("components", {}).get("schemas", {})
    return document


@cache  # the faces of a running stack come and go and its contracts do not; their schemas take tens of milliseconds
def _beyond_the_draft(contracts: tuple[type[Api], ...]) -> Json:
    found = _operations(contracts)
    schemas = _Schemas(found, _FullSchema, _in_full)
    paths: Json = {}
    for operation in found:
        gained = any(parameter.is_extension for parameter in operation.query.values())
        if _is_draft(operation) and not gained:
            continue
        described = _described(operation, schemas)
        described["operationId"] = f"{operation.api.name}_{operation.name}"
        described["x-extension"] = not _is_draft(operation)
        described["parameters"] = [_query(parameter, schemas, operation) for parameter in operation.query.values()]
        described["responses"] = _responses(_full_reply(operation, schemas))
        paths.setdefault(operation.path, {})[operation.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "jsonSchemaDialect": DIALECT,
        "info": {"title": "Llama Stack extensions", "version": DRAFT_VERSION, "description": _EXTENSION_DESCRIPTION},
        "servers": [{"url": "/", "description": "The server that this document came from."}],
        "paths": paths,
        "components": {"responses": {}, "schemas": dict(sorted(schemas.all().items())) | _PROBLEM_PARTS},
        "tags": [
            {"name": tag, "description": _tag_description(tag, found)}
            for tag in sorted({operation.api.tag for operation in found})
        ],
    }


_DRAFT_DESCRIPTION = (
    "The operations of the Llama Stack draft, as this server serves them. Optional fields and further operations are"
    " in /openapi-ext.json; docs/openapi.md lists every difference from the draft's own file, with its reason."
)
_EXTENSION_DESCRIPTION = (
    "What this server has beyond the draft: further operations, optional fields (x-extension), limits and reply forms."
    " The draft's operations are in /openapi.json."
)


def _operations(apis: Iterable[type[Api]]) -> list[Operation]:
    contracts = {contract_of(api): None for api in apis}
    return sorted(
        (operation for contract in contracts for operation in operations(contract)),
        key=lambda operation: (operation.path, operation.method),
    )


def _is_draft(operation: Operation) -> bool:
    return operation.api in DRAFT_APIS and not operation.is_extension


def _beside(taken: Mapping[str, Json], face: Json) -> Json:
    """The face's document with those of its schemas renamed whose names are taken."""
    prefix = re.sub(r"\W+", "_", str(face.get("info", {}).get("title", "face")))
    clashing = taken.keys() & face.get("components", {}).get("schemas", {}).keys()

    def renamed(part: Any) -> Any:
        if isinstance(part, dict):
            if isinstance(part.get("$ref"), str) and _name(part) in clashing:
                part = part | {"$ref": f"{_COMPONENT}{prefix}_{_name(part)}"}
            return {key: renamed(value) for key, value in part.items()}
        return [renamed(value) for value in part] if isinstance(part, list) else part

    face = renamed(face)
    schemas = {
        f"{prefix}_{name}" if name in clashing else name: schema
        for name, schema in face.get("components", {}).get("schemas", {}).items()
    }
    return face | {"components": {"schemas": schemas}}


def _described(operation: Operation, schemas: _Schemas) -> Json:
    """What an operation's entry says in both documents: whose it is, what it does, and its body."""
    described: Json = {"tags": [operation.api.tag]}
    if operation.doc:
        described["description"] = operation.doc
    if operation.body:
        content = {"application/json": {"schema": schemas.body(operation)}}
        described["requestBody"] = {"content": content, "required": operation.body.is_required}
    return described


def _query(parameter: Parameter, schemas: _Schemas, operation: Operation) -> Json:
    schema = schemas.query(operation, parameter.name)
    if isinstance(parameter.default, str | bool | int | float):
        schema = schema | {"default": parameter.default}
    return {"in": "query", "name": parameter.name, "required": parameter.is_required, "schema": schema}


def _draft_reply(operation: Operation, schemas: _Schemas) -> Json:
    """A reply as the draft declares it: a streamed one is JSON of either kind, a list is lines (rules G6, G7)."""
    if operation.shape is Shape.VOID:
        return {}
    if operation.shape is Shape.LINES:
        return {"application/jsonl": {"schema": schemas.result(operation)}}
    if operation.shape is Shape.REPLY and operation.stream_parameter is None:
        return {
            "application/json": {"schema": {"oneOf": [schemas.result(operation), schemas.chunk(operation)]}},
        }
    return {"application/json": {"schema": schemas.result(operation)}}


def _full_reply(operation: Operation, schemas: _Schemas) -> Json:
    """A reply in every form that the Accept header and the request can ask for."""
    if operation.shape is Shape.VOID:
        return {}
    result = schemas.result(operation)
    if operation.shape is Shape.LINES:
        return {
            "application/jsonl": {"schema": result},
            "application/json": {"schema": {"type": "array", "items": result}},
        }
    if operation.shape is Shape.REPLY:
        chunk = {"schema": schemas.chunk(operation)}
        return {"application/json": {"schema": result}, "text/event-stream": chunk, "application/jsonl": chunk}
    return {"application/json": {"schema": result}}


def _responses(reply: Json) -> Json:
    success = {"description": "OK"} | ({"content": reply} if reply else {})
    problem = {"application/problem+json": {"schema": {"$ref": _COMPONENT + "Problem"}}}
    return {"200": success, "default": {"description": "Anything but a success.", "content": problem}}


def _tag_description(tag: str, found: Iterable[Operation]) -> str:
    api = next(operation.api for operation in found if operation.api.tag == tag)
    return (api.__doc__ or "").strip().partition("\n")[0]


class _FullSchema(GenerateJsonSchema):
    """Pydantic's schemas without made-up titles, with defaults only where they are scalars."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        found = super().model_schema(schema)
        model = schema["cls"]
        if not model.model_config.get("title"):
            found.pop("title", None)
        if issubclass(model, Schema) and model.inline:
            found["x-inline"] = True
        return found

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        found = super().default_schema(schema)
        if not isinstance(found.get("default"), str | bool | int | float):
            found.pop("default", None)
        return found


class _DraftSchema(_FullSchema):
    """A field is required unless its default is ``None`` (spec rule G1)."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        schema: CoreSchema = field["schema"]
        return not (schema["type"] == "default" and "default" in schema and schema["default"] is None)


class _Schemas:
    """The schemas of some operations' parameters, bodies, replies and chunks, each finished for one document."""

    def __init__(
        self,
        found: Iterable[Operation],
        generator: type[GenerateJsonSchema],
        finish: Callable[[Json, Mapping[str, Json]], Json],
    ) -> None:
        adapters = [(role, "validation", adapter) for operation in found for role, adapter in _adapters(operation)]
        roles, named = TypeAdapter.json_schemas(
            adapters,  # type: ignore[arg-type]  # the mode is a Literal that the list does not carry
            ref_template=DEFAULT_REF_TEMPLATE,
            schema_generator=generator,
        )
        self._definitions: Mapping[str, Json] = named.get("$defs", {})
        self._roles = {role: schema for (role, _mode), schema in roles.items()}
        self._finish = finish

    def query(self, operation: Operation, name: str) -> Json:
        return self._finished(self._roles[f"{operation.key} ?{name}"])

    def body(self, operation: Operation) -> Json:
        return self._finished(self._roles[f"{operation.key} body"])

    def result(self, operation: Operation) -> Json:
        return self._finished(self._roles[f"{operation.key} result"])

    def chunk(self, operation: Operation) -> Json:
        return self._finished(self._roles[f"{operation.key} chunk"])

    def all(self) -> dict[str, Json]:
        """Every named schema."""
        return {name: self._component(name) for name in self._definitions}

    def reached_from(self, part: Any) -> dict[str, Json]:
        """The named schemas that this part of a document refers to, and those that they refer to, sorted by name."""
        reached: dict[str, Json] = {}
        pending = list(_referred(part))
        while pending:
            name = pending.pop()
            if name not in reached and name in self._definitions:
                reached[name] = self._component(name)
                pending.extend(_referred(reached[name]))
        return dict(sorted(reached.items()))

    def _component(self, name: str) -> Json:
        return self._finish(self._definitions[name], self._definitions)

    def _finished(self, schema: Json) -> Json:
        """A schema that is the whole of a body or a reply keeps its name, also where the draft writes it in place."""
        if set(schema) == {"$ref"} and "enum" not in self._definitions[_name(schema)]:
            return {"$ref": _COMPONENT + _name(schema)}
        return self._finish(schema, self._definitions)


def _adapters(operation: Operation) -> Iterator[tuple[str, TypeAdapter[Any]]]:
    for name, parameter in operation.query.items():
        yield f"{operation.key} ?{name}", parameter.adapter
    if operation.body:
        yield f"{operation.key} body", operation.body.adapter
    if operation.shape is not Shape.VOID:
        yield f"{operation.key} result", operation.result_adapter
    if operation.chunk is not None:
        yield f"{operation.key} chunk", operation.chunk_adapter


def _name(reference: Json) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _referred(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield _name(part)
        for value in part.values():
            yield from _referred(value)
    elif isinstance(part, list):
        for value in part:
            yield from _referred(value)


def _in_draft_words(schema: Json, definitions: Mapping[str, Json]) -> Json:
    """A schema as the draft words it: no limits, nothing of ours, small schemas written out in place."""
    if "$ref" in schema:
        definition = definitions[_name(schema)]
        if "enum" not in definition and "x-inline" not in definition and "x-draft" not in schema:
            return {"$ref": _COMPONENT + _name(schema)}
        schema = definition | {key: value for key, value in schema.items() if key != "$ref"}
    worded = schema.get("x-draft", {}).get("schema")
    if worded:
        kept = {key: schema[key] for key in ("default", "description") if key in schema}
        return dict(worded) | kept
    finished = {key: value for key, value in schema.items() if key not in _LIMITS and not key.startswith("x-")}
    if "properties" in schema:
        fields = {name: field for name, field in schema["properties"].items() if "x-extension" not in field}
        required = [
            name
            for name, field in fields.items()
            if name in schema.get("required", ()) or field.get("x-draft", {}).get("required")
        ]
        finished |= {"properties": fields} | ({"required": required} if required else {})
    if "x-any-of" in schema:
        finished["anyOf"] = finished.pop("oneOf")
    elif "anyOf" in finished:
        finished["oneOf"] = finished.pop("anyOf")
    return _each_part(finished, lambda part: _in_draft_words(part, definitions))


def _in_full(schema: Json, definitions: Mapping[str, Json]) -> Json:
    """A schema with all that the server checks."""
    hidden = {"x-draft", "x-inline", "x-any-of"}
    finished = {key: value for key, value in schema.items() if key not in hidden}
    if "$ref" in schema:
        finished["$ref"] = _COMPONENT + _name(schema)
    if "x-any-of" in schema:
        finished["anyOf"] = finished.pop("oneOf")
    return _each_part(finished, lambda part: _in_full(part, definitions))


def _each_part(schema: Json, change: Callable[[Json], Json]) -> Json:
    """The schema with ``change`` made to every schema directly inside it."""
    changed = dict(schema)
    for key, value in schema.items():
        if key == "properties":
            changed[key] = {name: change(part) for name, part in value.items()}
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            changed[key] = change(value)
        elif key in ("anyOf", "oneOf", "allOf"):
            changed[key] = [change(part) for part in value]
    return changed

"""Whatever the draft allows, the contracts read, keep and write again as the draft allows."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_stack.apis import DRAFT_APIS, Operation, Shape, operations
from tests.draft_schemas import DraftSchemas, draft, read_overlaps_as_any_of

NAMED: dict[str, st.SearchStrategy[Any]] = {
    "executable_tools": st.just([]),
    "strategy": st.sampled_from(["greedy", "top_p", "top_k"]),
    "reward_scoring": st.just({}),
}
"""Fields in which the readings of spec/README.md allow less than the draft's schema (G12, operations 1 and 24)."""

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
OPERATIONS = [o for api in DRAFT_APIS for o in operations(api) if not o.is_extension]


def values(schema: dict[str, Any], document: dict[str, Any]) -> st.SearchStrategy[Any]:
    """JSON values that the schema allows; numbers stay between 0 and 0.4, counts between 1 and 9."""
    if "$ref" in schema:
        return values(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
    for choices in ("oneOf", "anyOf"):
        if choices in schema:
            return st.one_of([values(choice, document) for choice in schema[choices]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema["type"]
    if kind == "object" and "properties" in schema:
        fields = {
            name: st.just(field["default"])
            if name == "step_type" and "default" in field
            else NAMED[name]
            if name in NAMED
            else values(field, document)
            for name, field in schema["properties"].items()
        }
        required = {name: fields.pop(name) for name in schema.get("required", ())}
        return st.fixed_dictionaries(required, optional=fields)
    if kind == "object":
        inner = schema.get("additionalProperties")
        return st.dictionaries(TEXTS, values(inner, document), max_size=2) if inner else st.just({})
    if kind == "array":
        return st.lists(values(schema["items"], document), max_size=2) if "items" in schema else st.just([])
    if kind == "string" and schema.get("contentEncoding") == "base64":
        return st.binary(max_size=6).map(lambda data: base64.b64encode(data).decode())
    if kind == "string" and schema.get("format") == "uri":
        return st.sampled_from(["http://h/x", "https://h", "file:///x", "data:,x"])
    if kind == "string" and schema.get("format") == "date-time":
        return st.datetimes().map(lambda time: time.isoformat() + "Z")
    plain = {
        "string": TEXTS,
        "boolean": st.booleans(),
        "integer": st.integers(1, 9),
        "number": st.sampled_from([0.1, 0.25, 0.4]),
        "null": st.none(),
    }
    return plain[kind]


def has(operation: Operation, part: str) -> bool:
    """Whether the draft gives the operation this part."""
    if part == "body":
        return operation.body is not None
    if part == "chunk":
        return operation.shape is Shape.REPLY and operation.stream_parameter is None
    return operation.shape is not Shape.VOID


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        pytest.param(operation, part, id=f"{operation.key} {part}")
        for operation in OPERATIONS
        for part in ("body", "reply", "chunk")
        if has(operation, part)
    ],
)
def test_a_value_of_the_draft_is_read_and_written_unchanged(operation: Operation, part: str) -> None:
    """Clients that were generated from the draft, in both directions: nothing is refused, dropped or added."""
    document = read_overlaps_as_any_of(draft())
    judge = DraftSchemas()
    described = document["paths"][operation.path][operation.method.lower()]
    if part == "body":
        assert operation.body is not None
        adapter, content = operation.body.adapter, described["requestBody"]["content"]
    else:
        adapter = operation.chunk_adapter if part == "chunk" else operation.result_adapter
        content = described["responses"]["200"]["content"]
    schema = next(iter(content.values()))["schema"]
    if part != "body" and "oneOf" in schema:
        schema = schema["oneOf"][part == "chunk"]

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(values(schema, document))
    def round_trip(value: Any) -> None:
        written = json.loads(adapter.dump_json(adapter.validate_json(json.dumps(value)), exclude_none=True))
        if part == "body":
            judge.check_request(operation.key, written)
        else:
            judge.check_reply(operation.key, written, chunk=part == "chunk")
        assert same(written) == same(value)

    round_trip()


def same(value: Any) -> Any:
    """The value with times brought to one form."""
    if isinstance(value, dict):
        return {key: same(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [same(inner) for inner in value]
    if isinstance(value, str) and value.endswith("Z") and "." in value:
        return value.rstrip("Z").rstrip("0").rstrip(".") + "Z"
    return value

"""The draft's own schemas, by which requests and replies are judged strictly.

The file is looked for beside the checkout, or where the variable ``LLAMA_STACK_DRAFT`` says; a test that needs it and
does not find it skips. Two readings are applied, and no others: rules G3 and G4 of the spec, ``anyOf`` for ``oneOf``
where the branches of a ``oneOf`` overlap.
"""

from __future__ import annotations

import base64
import binascii
import copy
import os
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from jsonschema import Draft202012Validator, FormatChecker, ValidationError, validators

DRAFT = Path(
    os.environ.get("LLAMA_STACK_DRAFT")
    or Path(__file__).resolve().parents[2] / "shared" / "spec" / "llama-stack-draft-0.0.1.yaml"
)


@cache
def _read_draft() -> dict[str, Any]:
    document: dict[str, Any] = yaml.load(DRAFT.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    return document


def draft() -> dict[str, Any]:
    """A copy of the draft as it was written; skips the test where the file is missing."""
    if not DRAFT.is_file():
        pytest.skip(f"the draft is not at {DRAFT}; set LLAMA_STACK_DRAFT to its path")
    return copy.deepcopy(_read_draft())


def read_overlaps_as_any_of(document: dict[str, Any]) -> dict[str, Any]:
    """Apply G3 (a built-in tool's name is also a string) and G4 (three identical adapter settings) in place."""
    for fields in _properties(document):
        for name in ("tool_name", "algorithm_config"):
            if "oneOf" in fields.get(name, {}):
                fields[name]["anyOf"] = fields[name].pop("oneOf")
    return document


class DraftSchemas:
    """Judges the bodies and replies of the draft's operations, each named as in ``POST /inference/completion``."""

    def __init__(self) -> None:
        self._document = read_overlaps_as_any_of(draft())

    @property
    def operations(self) -> list[str]:
        """The draft's operations."""
        return [f"{method.upper()} {path}" for path, item in self._document["paths"].items() for method in item]

    def reply_faults(self, operation: str, value: Any, *, chunk: bool = False) -> list[str]:
        """What is wrong with a decoded reply, one line of it, or (``chunk``) one streamed chunk."""
        content = self._operation(operation)["responses"]["200"].get("content", {})
        if not content:
            return [] if value is None else [f"{operation} answers nothing, not {value!r}"]
        schema = next(iter(content.values()))["schema"]
        if "oneOf" in schema:
            schema = schema["oneOf"][1 if chunk else 0]
        return self._faults(schema, value)

    def request_faults(self, operation: str, value: Any) -> list[str]:
        """What is wrong with a decoded body."""
        return self._faults(self._operation(operation)["requestBody"]["content"]["application/json"]["schema"], value)

    def check_reply(self, operation: str, value: Any, *, chunk: bool = False) -> None:
        """Fail the test unless the draft allows this reply."""
        faults = self.reply_faults(operation, value, chunk=chunk)
        assert not faults, f"{operation}: " + "; ".join(faults)

    def check_request(self, operation: str, value: Any) -> None:
        """Fail the test unless the draft allows this body."""
        faults = self.request_faults(operation, value)
        assert not faults, f"{operation}: " + "; ".join(faults)

    def _operation(self, operation: str) -> dict[str, Any]:
        method, _, path = operation.partition(" ")
        described: dict[str, Any] = self._document["paths"][path][method.lower()]
        return described

    def _faults(self, schema: dict[str, Any], value: Any) -> list[str]:
        judge = _Strict({"components": self._document["components"]} | schema, format_checker=_FORMATS)
        return [f"{fault.json_path}: {fault.message[:300]}" for fault in judge.iter_errors(value)]


def _properties(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        if isinstance(part.get("properties"), dict):
            yield part["properties"]
        for value in part.values():
            yield from _properties(value)
    elif isinstance(part, list):
        for value in part:
            yield from _properties(value)


def _base64(validator: Any, encoding: str, value: Any, schema: Any) -> Iterator[ValidationError]:
    if encoding == "base64" and isinstance(value, str):
        try:
            base64.b64decode(value, validate=True)
        except binascii.Error:
            yield ValidationError(f"{value[:40]!r} is not base64")


_Strict: Any = validators.extend(Draft202012Validator, {"contentEncoding": _base64})  # type: ignore[no-untyped-call]
_FORMATS = FormatChecker(formats=())


@_FORMATS.checks("date-time", raises=ValueError)
def _is_date_time(value: object) -> bool:
    return not isinstance(value, str) or datetime.fromisoformat(value).tzinfo is not None


@_FORMATS.checks("uri", raises=ValueError)
def _is_uri(value: object) -> bool:
    return not isinstance(value, str) or bool(urlsplit(value).scheme)

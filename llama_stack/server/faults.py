"""What pydantic found wrong with a request, as faults that a caller can act on.

Each fault has a JSON pointer into the body, a short code, and words that say what would be right. Of a union only the
branch that the value was meant for is reported, and an unknown key comes with the nearest one that is known.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json

from ..errors import (
    FieldFault,
    InvalidRequestError,
    MalformedJsonError,
    NestingTooDeepError,
    RequestError,
    nearest,
)

MAX_LISTED = 1_000
"""Errors that are looked at one by one; a body with more of them is answered with their number."""

_CODES = {
    "missing": "missing",
    "extra_forbidden": "unknown_key",
    "enum": "not_in_enum",
    "literal_error": "not_in_enum",
    "string_too_short": "too_short",
    "string_too_long": "too_long",
    "too_short": "too_short",
    "too_long": "too_long",
    "bytes_too_long": "too_long",
    "greater_than": "too_small",
    "greater_than_equal": "too_small",
    "less_than": "too_large",
    "less_than_equal": "too_large",
    "string_pattern_mismatch": "bad_format",
    "union_tag_invalid": "not_in_enum",
    "union_tag_not_found": "missing",
    "finite_number": "not_finite",
}
_LIMITS = ("max_length", "min_length", "ge", "gt", "le", "lt")
_EXPECTED = {
    "string_type": "a string",
    "list_type": "a list",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dict_type": "an object",
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
}


def refusal(error: ValidationError, body: bytes, annotation: Any) -> RequestError:
    """The error to answer with when ``body`` does not validate as ``annotation``."""
    if error.error_count() > MAX_LISTED:
        return InvalidRequestError(f"{error.error_count()} fields are invalid, too many to list")
    details = error.errors(include_url=False, include_input=False)
    if details[0]["type"] == "json_invalid":
        reason = str(details[0].get("ctx", {}).get("error", "cannot be parsed"))
        if "recursion" in reason:
            return NestingTooDeepError("the body is nested deeper than the parser reads")
        return MalformedJsonError(f"the body is not valid JSON: {reason}")
    value = from_json(body)
    return of_faults(_faults(details, value, annotation))


def of_faults(faults: Sequence[FieldFault]) -> InvalidRequestError:
    """One error for all that is wrong; the detail names the only fault, or says how many there are."""
    if len(faults) == 1:
        return InvalidRequestError(f"{_spoken(faults[0].pointer)}{faults[0].detail}", faults=faults)
    return InvalidRequestError(f"{len(faults)} fields are invalid", faults=faults)


def parameter_fault(name: str, error: ValidationError) -> FieldFault:
    """What is wrong with the value of a query parameter."""
    detail = error.errors(include_url=False, include_input=False)[0]
    return FieldFault(f"?{name}", _code(detail), _words(detail), _limit(detail))


def pointer(parts: Iterable[str | int]) -> str:
    """An RFC 6901 JSON pointer."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def _faults(details: list[ErrorDetails], value: Any, annotation: Any) -> list[FieldFault]:
    placed = [(_place(detail, value), detail) for detail in details]
    kept: dict[tuple[tuple[str | int, ...], str], FieldFault] = {}
    for (path, in_union), detail in placed:
        if in_union and detail["type"] in _EXPECTED:
            # of a union, the branches for other JSON types each complain once, at the union itself
            others = [(p, d) for (p, _), d in placed if p[: len(path)] == path and d is not detail]
            if any(len(p) > len(path) or d["type"] not in _EXPECTED for p, d in others):
                continue
            wanted = sorted({_EXPECTED[detail["type"]], *(_EXPECTED[d["type"]] for _, d in others)})
            fault = FieldFault(pointer(path), "wrong_type", f"should be {_either(wanted)}")
        else:
            words = _words(detail)
            if detail["type"] == "extra_forbidden":
                words += nearest(str(path[-1]), _keys_at(annotation, detail["loc"][:-1]))
            fault = FieldFault(pointer(path), _code(detail), words, _limit(detail))
        kept.setdefault((path, fault.code), fault)
    return list(kept.values())


def _place(detail: ErrorDetails, value: Any) -> tuple[tuple[str | int, ...], bool]:
    """The path of an error into the value itself, and whether it ends in a branch of a union.

    pydantic's location also names the branches of unions that it tried; those are not keys of the value.
    """
    path: list[str | int] = []
    in_union = False
    absent = len(detail["loc"]) - 1 if detail["type"] == "missing" else None
    for step, part in enumerate(detail["loc"]):
        is_key = isinstance(value, dict) and isinstance(part, str) and part in value
        is_item = isinstance(value, list) and isinstance(part, int)
        if is_key or is_item:
            value = value[part] if is_key or int(part) < len(value) else None
        elif step != absent:
            in_union = True
            continue
        path.append(part)
        in_union = False
    return tuple(path), in_union


def _keys_at(annotation: Any, location: tuple[int | str, ...]) -> set[str]:
    """The keys that the model at a location knows; those of all branches where it is one of several."""
    found = _branches(annotation)
    for part in location:
        inner: list[Any] = []
        for branch in found:
            if isinstance(part, int):
                inner += [a for item in get_args(branch)[:1] for a in _branches(item)]
            elif isinstance(branch, type) and issubclass(branch, BaseModel) and part in branch.model_fields:
                inner += _branches(branch.model_fields[part].annotation)
        found = inner or [b for b in found if getattr(b, "__name__", None) == part] or found
    return {key for b in found if isinstance(b, type) and issubclass(b, BaseModel) for key in b.model_fields}


def _branches(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _branches(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [branch for arg in get_args(annotation) for branch in _branches(arg)]
    return [annotation]


def _code(detail: ErrorDetails) -> str:
    kind = detail["type"]
    if kind in _CODES:
        return _CODES[kind]
    return "wrong_type" if kind.endswith("_type") else "invalid"


def _limit(detail: ErrorDetails) -> float | None:
    context = detail.get("ctx", {})
    return next((context[name] for name in _LIMITS if isinstance(context.get(name), int | float)), None)


def _words(detail: ErrorDetails) -> str:
    kind = detail["type"]
    if kind == "missing":
        return "is required"
    if kind == "extra_forbidden":
        return "is not a key here"
    if kind == "value_error":
        return str(detail.get("ctx", {}).get("error", "is invalid"))
    if kind == "union_tag_invalid":
        return f"should be {detail.get('ctx', {}).get('expected_tags', 'another')}"
    if kind == "string_pattern_mismatch":
        return f"should match {detail.get('ctx', {}).get('pattern', 'its pattern')}"
    words = detail["msg"].removeprefix("Input ").removeprefix("String ").removeprefix("List ")
    return words.replace(" after validation, not ", ", not ")


def _either(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _spoken(at: str) -> str:
    return f"{at}: " if at else ""

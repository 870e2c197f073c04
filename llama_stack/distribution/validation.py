"""Marked nodes to models: pydantic judges, and its errors become faults at the place where the value stands.

Values are validated strictly, as JSON: a quoted number is text. Text that came from an environment variable is
converted by pydantic when the field wants a number or a boolean, and no message shows it.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_core.core_schema import ErrorType

from ..apis.config import NAME_PATTERN
from . import nodes
from .faults import Fault, Mark, Path, is_secret, shortened
from .models import ORIGIN_PATTERN
from .nodes import Broken, Node, Scalar, Sequence, shown

_M = TypeVar("_M", bound=BaseModel)

# how often text from variables is converted: a conversion can uncover a union's next wish, and no union here is longer
_ROUNDS = 3

_CONVERTED: dict[str, TypeAdapter[Any]] = {
    "int_type": TypeAdapter(int),
    "float_type": TypeAdapter(float),
    "bool_type": TypeAdapter(bool),
}

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "dataclass_type": "a mapping of keys",
    "none_required": "nothing",
}

_PATTERNS = {
    NAME_PATTERN: ("is not a name", "use lowercase letters, digits, '-' and '_', and begin with a letter or digit"),
    ORIGIN_PATTERN: ("is not an origin", "write scheme and host alone, such as https://chat.example"),
}

_VALIDATORS_KINDS = ("value_error", "assertion_error")
"""Errors whose words a validator wrote; a ``PydanticCustomError`` has a kind of its own besides."""
_PYDANTICS_KINDS = frozenset(get_args(ErrorType)).difference(_VALIDATORS_KINDS)

_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]+)?")


@dataclass(frozen=True)
class Finding:
    """One error of pydantic, tied to the node that it speaks of."""

    node: Node
    mark: Mark
    path: Path
    parent: Path
    """The part of the path that leads to an existing node: all of it but for a missing key."""
    error: ErrorDetails


def validate(
    model: type[_M], node: nodes.Mapping, path: Path, hidden: Mapping[str, str], faults: list[Fault]
) -> _M | None:
    """The model that the node describes, or ``None`` after adding what is wrong with it to ``faults``.

    ``path`` leads to the node from the file's root. ``hidden`` holds the variables whose values no message may show.
    """
    converted: dict[Path, Any] = {}
    for _ in range(_ROUNDS):
        try:
            value = model.model_validate_json(json.dumps(_plain(node, (), converted)), strict=True)
        except ValidationError as error:
            findings = list(_findings(error, node))
            fresh = {f.path: v for f in findings if f.path not in converted and (v := _conversion(f)) is not None}
            if not fresh:
                break
            converted |= fresh
        else:
            return None if _has_broken(node) else value
    if findings:
        faults += _described(model, findings, path, hidden)
    return None


def _plain(node: Node, path: Path, converted: Mapping[Path, Any]) -> Any:
    match node:
        case nodes.Mapping(entries=entries):
            return {key: _plain(value, (*path, key), converted) for key, value in entries.items()}
        case Sequence(items=items):
            return [_plain(item, (*path, index), converted) for index, item in enumerate(items)]
        case Scalar(value=value):
            return converted.get(path, value)
    return None


def _has_broken(node: Node) -> bool:
    match node:
        case nodes.Mapping(entries=entries):
            return any(_has_broken(value) for value in entries.values())
        case Sequence(items=items):
            return any(_has_broken(item) for item in items)
    return isinstance(node, Broken)


def _findings(error: ValidationError, root: nodes.Mapping) -> Iterator[Finding]:
    """The errors that do not come from a value already refused."""
    for detail in error.errors(include_url=False, include_input=False):
        finding = _located(detail, root)
        if not isinstance(finding.node, Broken):
            yield finding


def _located(detail: ErrorDetails, root: nodes.Mapping) -> Finding:
    node: Node = root
    mark = root.mark
    path: list[str | int] = []
    for part in detail["loc"]:
        match node:
            case nodes.Mapping() if isinstance(part, str) and part in node.entries:
                mark, node = node.marks.get(part, node.mark), node.entries[part]
            case Sequence() if isinstance(part, int) and part < len(node.items):
                node = node.items[part]
                mark = node.mark
            case _:
                continue  # pydantic also names the branch of a union, which no key stands for
        path.append(part)
    parent = tuple(path)
    if detail["type"] == "missing" and detail["loc"]:
        path.append(detail["loc"][-1])
    tag = str(detail.get("ctx", {}).get("discriminator", "")).strip("'")
    if tag and isinstance(node, nodes.Mapping):
        path.append(tag)
        if tag in node.entries:
            mark, node = node.marks[tag], node.entries[tag]
    if isinstance(node, Scalar) and detail["type"] != "extra_forbidden":
        mark = node.mark
    return Finding(node, mark, tuple(path), parent, detail)


def _conversion(finding: Finding) -> Any:
    """What text from a variable means as the number or boolean that the field wants, or ``None``."""
    node, adapter = finding.node, _CONVERTED.get(finding.error["type"])
    if not isinstance(node, Scalar) or not node.variables or adapter is None:
        return None
    try:
        return adapter.validate_python(node.value, strict=False)
    except ValidationError:
        return None


def _described(
    model: type[BaseModel], findings: list[Finding], prefix: Path, hidden: Mapping[str, str]
) -> Iterator[Fault]:
    """One fault a place: a union reports every branch that did not fit, and one line should hold them all."""
    by_place: dict[tuple[Path, bool], list[Finding]] = {}
    for finding in _without_consequences(model, findings):
        by_place.setdefault((finding.path, finding.error["type"] == "missing"), []).append(finding)
    for found in by_place.values():
        texts = [_texts(model, finding, hidden) for finding in found]
        wanted = dict.fromkeys(w for f in found if (w := _WANTED.get(f.error["type"])))
        what, remedy = texts[0]
        if len(wanted) > 1:
            what = f"expected {' or '.join(wanted)}, got {_kind(found[0])}"
        remedies = dict.fromkeys(remedy for _, remedy in texts)
        yield Fault.at(
            found[0].mark, (*prefix, *found[0].path), what, " or ".join(remedies) if len(found) > 1 else remedy
        )


def _without_consequences(model: type[BaseModel], findings: list[Finding]) -> list[Finding]:
    """A misspelt key is also a missing one; only the first is worth a line."""
    meant = {
        (*finding.path[:-1], close)
        for finding in findings
        if finding.error["type"] == "extra_forbidden" and (close := _close_key(model, finding.path))
    }
    return [finding for finding in findings if finding.error["type"] != "missing" or finding.path not in meant]


def _close_key(model: type[BaseModel], path: Path) -> str | None:
    known = dict.fromkeys(name for owner in _models_at(model, path[:-1]) for name in _fields(owner))
    close = get_close_matches(str(path[-1]), known, n=1, cutoff=0.6)
    return close[0] if close else None


def _texts(model: type[BaseModel], finding: Finding, hidden: Mapping[str, str]) -> tuple[str, str]:
    """What is wrong and what would be right."""
    kind, context = finding.error["type"], finding.error.get("ctx", {})
    got = _shown(finding)
    wanted = _WANTED.get(kind)
    if kind in ("missing", "union_tag_not_found"):
        return "the key is missing", _missing_remedy(model, finding)
    if kind == "extra_forbidden":
        return "unknown key", _unknown_remedy(model, finding)
    if wanted:
        return f"expected {wanted}, got {_kind(finding)}", _type_remedy(wanted, finding)
    for limit, short, right in (
        ("ge", "too small", "or more"),
        ("gt", "too small", None),
        ("le", "too large", "or less"),
        ("lt", "too large", None),
    ):
        if limit in context:
            bound = f"{context[limit]:g}" if isinstance(context[limit], float) else context[limit]
            more = "more" if short == "too small" else "less"
            return f"{got} is {short}", f"write {bound} {right}" if right else f"write {more} than {bound}"
    if kind in ("literal_error", "enum", "union_tag_invalid"):
        return _choice(str(context.get("expected") or context.get("expected_tags")), got, finding.node)
    if kind == "string_pattern_mismatch":
        return _pattern(str(context["pattern"]), got)
    for limit, what, right in (("min_length", "too short", "at least"), ("max_length", "too long", "at most")):
        if limit in context:
            unit = "character" if isinstance(finding.node, Scalar) else "item"
            unit += "s" if context[limit] != 1 else ""
            what = "empty" if context[limit] == 1 and limit == "min_length" else what
            return f"{got} is {what}", f"write {right} {context[limit]} {unit}"
    if kind not in _PYDANTICS_KINDS:
        return _refusal(finding, hidden)
    said = finding.error["msg"].replace("Input should", "it should")
    return f"{got} is refused: {said}", "see 'llama-stack schema' for what this key may hold"


def _shown(finding: Finding) -> str:
    if _is_hidden(finding):
        return "the value"
    return shown(finding.node)


def _is_hidden(finding: Finding) -> bool:
    """Whether the key's name says that its value, though written in the file, should not be printed."""
    node = finding.node
    return isinstance(node, Scalar) and node.value is not None and not node.variables and is_secret(finding.path)


def _kind(finding: Finding) -> str:
    node = finding.node
    is_text = isinstance(node, Scalar) and isinstance(node.value, str) and not node.variables
    shown_value = _shown(finding)
    return f"the text {shown_value}" if is_text and shown_value.startswith(("'", '"')) else shown_value


def _type_remedy(wanted: str, finding: Finding) -> str:
    node = finding.node
    if isinstance(node, Scalar) and node.value is None:
        return f"write {wanted}, or remove the key"
    if wanted == "a list":
        return "write each item on a line of its own after '- '"
    if wanted == "a mapping of keys":
        return "write 'key: value' lines, indented below this key"
    if isinstance(node, Scalar) and node.variables:
        return f"set {', '.join(node.variables)} to {wanted}"
    if _is_hidden(finding):
        return "put it in quotes" if wanted == "text" else f"write {wanted}"
    if wanted == "text" and isinstance(node, Scalar):
        return f'quote it: "{shown(node)}"'
    if wanted in ("a whole number", "a number") and isinstance(node, Scalar) and isinstance(node.value, str):
        return f"write {node.value} without quotes" if _NUMBER.fullmatch(node.value) else f"write {wanted}"
    if wanted == "true or false" and isinstance(node, Scalar) and node.value in ("true", "false"):
        return f"write {node.value} without quotes"
    return f"write {wanted}"


def _choice(expected: str, got: str, node: Node) -> tuple[str, str]:
    choices = re.findall(r"'([^']*)'", expected) or [expected]
    value = node.value if isinstance(node, Scalar) and not node.variables else None
    close = get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{got} is not one of the choices", f"{hint}write {' or '.join(choices)}"


def _pattern(pattern: str, got: str) -> tuple[str, str]:
    what, remedy = _PATTERNS.get(pattern, ("does not have the right form", f"write text that matches {pattern}"))
    return f"{got} {what}", remedy


def _refusal(finding: Finding, hidden: Mapping[str, str]) -> tuple[str, str]:
    """The words of a validator, unless they could give away what a variable holds."""
    node = finding.node
    if isinstance(node, Scalar) and node.variables:
        return f"{shown(node)} is refused", f"check what {', '.join(node.variables)} holds"
    if _is_hidden(finding):
        return "the value is refused", "see 'llama-stack schema' for what this key may hold"
    said = str(finding.error.get("ctx", {}).get("error") or finding.error["msg"])
    for name, value in hidden.items():
        said = said.replace(value, f"${{env.{name}}}") if value else said
    what, _, remedy = said.partition("; ")
    return what, remedy or "see 'llama-stack schema' for what this key may hold"


def _missing_remedy(model: type[BaseModel], finding: Finding) -> str:
    key = str(finding.path[-1])
    for owner in _models_at(model, finding.parent):
        known = _fields(owner).get(key)
        if known is not None and known.description:
            return f"add '{key}:' ({_sentence(known.description)})"
    return f"add '{key}:'"


def _unknown_remedy(model: type[BaseModel], finding: Finding) -> str:
    key = str(finding.path[-1])
    owners = _models_at(model, finding.path[:-1])
    close = _close_key(model, finding.path)
    if close:
        return f"did you mean {close!r}?"
    for owner in owners:
        for name, field in _fields(owner).items():
            if any(key in _fields(inner) for inner in _models_in(field.annotation)):
                return f"it belongs below {name!r}"
    outside = _fields(model)
    if key in outside and owners and owners[0] is not model:
        return (
            f"it belongs one level up, beside {finding.path[-2]!r}" if len(finding.path) == 2 else "move it further out"
        )
    known = dict.fromkeys(name for owner in owners for name in _fields(owner))
    return f"remove it; known here: {', '.join(known) or 'no keys'}"


def _models_at(model: type[BaseModel], path: Path) -> list[type[BaseModel]]:
    """The models that may stand at a path of keys and positions, through unions, lists and mappings."""
    found: list[Any] = [model]
    for part in path:
        inner: list[Any] = []
        for annotation in found:
            for choice in _choices(annotation):
                if isinstance(choice, type) and issubclass(choice, BaseModel):
                    field = _fields(choice).get(str(part))
                    inner += [field.annotation] if field else []
                else:
                    arguments = [a for a in get_args(choice) if a is not Ellipsis]
                    inner += arguments[-1:] if isinstance(part, str) else arguments
        found = inner
    return [choice for annotation in found for choice in _models_in(annotation)]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    return [choice for choice in _choices(annotation) if isinstance(choice, type) and issubclass(choice, BaseModel)]


def _choices(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _choices(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for choice in get_args(annotation):
            yield from _choices(choice)
    else:
        yield annotation


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _sentence(text: str) -> str:
    return shortened(" ".join(text.split()).split(". ")[0].rstrip("."), 100)

"""The filter language of a memory bank's query: conditions over documents' metadata, with one meaning everywhere.

A condition is an object with one key, its operator::

    {"eq": ["source", "atlas"]}        also ne, lt, le, gt, ge: a key of the metadata, and a value
    {"in": ["year", [1997, 1998]]}     equal to one of the values
    {"and": [...]}  {"or": [...]}      all, any of these conditions
    {"not": ...}                       this condition does not hold

A value is a string, a number or a boolean, and compares only with values of its own type: numbers as IEEE 754 doubles
(1 equals 1.0), strings by their code points, ``false`` before ``true``. A comparison with a key that is missing, or
that holds another type, null, a list or an object, does not hold. ``ne`` is ``not eq``, so that it does hold there.

``sort_key`` turns a value into bytes whose order is this order, so that a store keeps the meaning by keeping the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from ..errors import FieldFault, InvalidRequestError, nearest

MAX_DEPTH = 16
"""How deep conditions may be nested."""
MAX_CONDITIONS = 256
"""How many comparisons a filter may have; each value of an ``in`` is one."""

Operator = Literal["eq", "lt", "le", "gt", "ge"]
OPERATORS = ("eq", "ne", "lt", "le", "gt", "ge", "in", "and", "or", "not")


@dataclass(frozen=True)
class Comparison:
    """The value at ``key`` compares with one whose ``sort_key`` is ``value``."""

    key: str
    operator: Operator
    value: bytes

    def holds(self, metadata: Mapping[str, Any]) -> bool:
        found = sort_key(metadata.get(self.key))
        if found is None or found[:1] != self.value[:1]:
            return False
        return {
            "eq": found == self.value,
            "lt": found < self.value,
            "le": found <= self.value,
            "gt": found > self.value,
            "ge": found >= self.value,
        }[self.operator]


@dataclass(frozen=True)
class Every:
    """All of the conditions hold; of none, that is true."""

    conditions: tuple[Condition, ...]

    def holds(self, metadata: Mapping[str, Any]) -> bool:
        return all(condition.holds(metadata) for condition in self.conditions)


@dataclass(frozen=True)
class Some:
    """At least one of the conditions holds; of none, that is false."""

    conditions: tuple[Condition, ...]

    def holds(self, metadata: Mapping[str, Any]) -> bool:
        return any(condition.holds(metadata) for condition in self.conditions)


@dataclass(frozen=True)
class Not:
    """The condition does not hold."""

    condition: Condition

    def holds(self, metadata: Mapping[str, Any]) -> bool:
        return not self.condition.holds(metadata)


Condition: TypeAlias = Comparison | Every | Some | Not


def sort_key(value: Any) -> bytes | None:
    """The value as bytes: a letter for its type, then what sorts as such values do; ``None`` for other types."""
    if isinstance(value, bool):
        return b"b\1" if value else b"b\0"
    if isinstance(value, int | float):
        return b"n" + _sortable(value)
    return b"s" + value.encode("utf-8", "surrogatepass") if isinstance(value, str) else None


def parse_filter(value: Any) -> Condition:
    """Read a filter. Raises ``InvalidRequestError`` that points at the part which is wrong."""
    return _Parser().condition(value, "/filter", MAX_DEPTH)


def _sortable(number: int | float) -> bytes:
    """Eight bytes that sort as doubles do (IEEE 754-2019, totalOrder); an integer out of range is an infinity."""
    try:
        double = float(number) + 0.0  # there is one zero
    except OverflowError:
        double = float("inf") if number > 0 else float("-inf")
    (bits,) = struct.unpack(">Q", struct.pack(">d", double))
    return struct.pack(">Q", bits ^ (0xFFFF_FFFF_FFFF_FFFF if bits >> 63 else 0x8000_0000_0000_0000))


class _Parser:
    def __init__(self) -> None:
        self._left = MAX_CONDITIONS

    def condition(self, node: Any, pointer: str, depth: int) -> Condition:
        if not isinstance(node, dict) or len(node) != 1:
            raise _wrong(pointer, f"a condition is an object with one key, one of {', '.join(OPERATORS)}")
        if depth == 0:
            raise _wrong(pointer, f"conditions are nested more than {MAX_DEPTH} deep")
        ((operator, operand),) = node.items()
        pointer = f"{pointer}/{operator.replace('~', '~0').replace('/', '~1')}"
        match operator:
            case "and" | "or":
                if not isinstance(operand, list):
                    raise _wrong(pointer, "a list of conditions belongs here")
                parts = tuple(self.condition(part, f"{pointer}/{n}", depth - 1) for n, part in enumerate(operand))
                return Every(parts) if operator == "and" else Some(parts)
            case "not":
                return Not(self.condition(operand, pointer, depth - 1))
        if operator not in OPERATORS:
            raise _wrong(pointer, f"{operator!r} is not an operator{nearest(operator, OPERATORS)}")
        if not isinstance(operand, list) or len(operand) != 2 or not isinstance(operand[0], str):
            raise _wrong(pointer, "a list of a key and a value belongs here")
        key, value = operand
        match operator:
            case "in":
                if not isinstance(value, list):
                    raise _wrong(f"{pointer}/1", "a list of values belongs here")
                return Some(tuple(self._compare(key, "eq", v, f"{pointer}/1/{n}") for n, v in enumerate(value)))
            case "ne":
                return Not(self._compare(key, "eq", value, f"{pointer}/1"))
        return self._compare(key, cast(Operator, operator), value, f"{pointer}/1")

    def _compare(self, key: str, operator: Operator, value: Any, pointer: str) -> Comparison:
        self._left -= 1
        if self._left < 0:
            raise _wrong(pointer, f"the filter has more than {MAX_CONDITIONS} comparisons")
        encoded = sort_key(value)
        if encoded is None:
            raise _wrong(pointer, "a string, a number or a boolean belongs here")
        return Comparison(key, operator, encoded)


def _wrong(pointer: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"the filter is not valid: {what}", faults=[FieldFault(pointer, "filter", what)])

"""The filter language: its values sort as they should. What conditions mean is told by the conformance suite."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llama_stack.apis.filters import parse_filter, sort_key

NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
VALUES = st.one_of(NUMBERS, st.text(), st.booleans())
OTHERS = st.one_of(st.none(), st.lists(st.integers()), st.dictionaries(st.text(), st.integers()))


def _double(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return float("inf") if number > 0 else float("-inf")


@given(NUMBERS, NUMBERS)
def test_numbers_sort_as_doubles(a: float, b: float) -> None:
    """Stores compare bytes."""
    left, right = sort_key(a), sort_key(b)
    assert left is not None
    assert right is not None
    assert (left < right, left == right) == (_double(a) < _double(b), _double(a) == _double(b))


@given(st.text(), st.text())
def test_texts_sort_by_code_points(a: str, b: str) -> None:
    """As Python compares, and as UTF-8 does."""
    left, right = sort_key(a), sort_key(b)
    assert left is not None
    assert right is not None
    assert (left < right, left == right) == (a < b, a == b)


@given(VALUES, st.one_of(VALUES, OTHERS))
def test_comparisons_hold_as_python_compares_values_of_one_type(value: Any, held: Any) -> None:
    """And never between types: false is not 0, and "1" is not 1."""

    def holds(operator: str) -> bool:
        return parse_filter({operator: ["key", value]}).holds({"key": held})

    def kind(of: Any) -> type:
        return float if type(of) is int else type(of)

    is_same = kind(value) is kind(held)
    a, b = (_double(held), _double(value)) if is_same and kind(value) is float else (held, value)
    assert holds("eq") == (is_same and a == b)
    assert holds("ne") == (not holds("eq"))
    assert holds("lt") == (is_same and a < b)
    assert holds("le") == (is_same and a <= b)
    assert holds("gt") == (is_same and a > b)
    assert holds("ge") == (is_same and a >= b)
    assert not parse_filter({"eq": ["missing", value]}).holds({"key": held})

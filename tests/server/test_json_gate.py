"""The gate in front of the JSON parser."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_stack.errors import MalformedJsonError, NestingTooDeepError, StackError, TooLargeError
from llama_stack.server import json_gate
from llama_stack.server.json_gate import check_json

LONG = b"k" * 5_000
REFUSED = {
    b"NaN": MalformedJsonError,
    b"[1,-Infinity]": MalformedJsonError,
    b'{"a":1e999}': MalformedJsonError,
    b"-1E400": MalformedJsonError,
    b"1" * 400 + b".5": MalformedJsonError,
    b"9" * 2_000: MalformedJsonError,
    b"9223372036854775808": MalformedJsonError,
    b"-9223372036854775809": MalformedJsonError,
    b'{"a":1,"a":1}': MalformedJsonError,
    b'{"a":1,"\\u0061":2}': MalformedJsonError,
    b'{"\\u00e9":1,"\xc3\xa9":2}': MalformedJsonError,
    b'{"a"   :1,"b":{"a":1},"a":2}': MalformedJsonError,
    b'{"a"' + b" " * 60_000 + b':1,"a":2}': MalformedJsonError,
    b'{"a"' + b" " * 70_000 + b':1,"a":2}': MalformedJsonError,
    b'{"' + LONG + b'":1,"' + LONG + b'" :2}': MalformedJsonError,
    b'{"' + b"\\n" * 5_000 + b'":1,"' + b"\\n" * 5_000 + b'":2}': MalformedJsonError,
    b"\xef\xbb\xbf{}": MalformedJsonError,
    '{"a":1}'.encode("utf-16"): MalformedJsonError,
    '{"a":1}'.encode("utf-16-le"): MalformedJsonError,
    '{"a":1}'.encode("utf-32"): MalformedJsonError,
    b"[true,nul]": MalformedJsonError,
    b"undefined": MalformedJsonError,
    b"[" * 65 + b"]" * 65: NestingTooDeepError,
    b'{"a":' * 500 + b"1" + b"}" * 500: NestingTooDeepError,
    b"[" + b"1," * 1_000 + b"1]": TooLargeError,
    b"[" + b"[]," * 1_000 + b"1]": TooLargeError,
    b"{" + b",".join(b'"%d":0' % n for n in range(1_001)) + b"}": TooLargeError,
}
ACCEPTED = [
    b"9223372036854775807",
    b"-9223372036854775808",
    b"1.7976931348623157e308",
    b"-0",
    b"0.1e-5",
    b'{"a":{"a":{"a":1}},"b":[{"a":1},{"a":1}]}',
    b'["NaN","1e999",":","\\"","{{{{","a\\\\",{"a":"a","b":"a"}]',
    b'"' + b"[" * 500 + b'"',
    b'{"' + LONG + b'1":1,"' + LONG + b'2":2}',
    b'["' + LONG + b'","' + LONG + b'"]',
    b'{"x":"' + b"\\n" * 9_000 + b'","y":"' + b'\\"' * 9_000 + b'"}',
    b"[" * 64 + b"]" * 64,
    b" \t\r\n[ 1 , 2 ]\n",
    b"[" + b"1," * 998 + b"1]",
]


def check(body: bytes) -> None:
    check_json(body, max_depth=64, max_nodes=1_000)


@pytest.mark.parametrize("body", REFUSED, ids=lambda body: repr(body[:24]))
def test_refuses_what_later_layers_cannot_carry(body: bytes) -> None:
    """A stock server answers 500 to some of these when it echoes them, and silently changes others."""
    with pytest.raises(REFUSED[body]):
        check(body)


@pytest.mark.parametrize("body", ACCEPTED, ids=lambda body: repr(body[:24]))
def test_lets_through_what_only_looks_alike(body: bytes) -> None:
    """Braces in strings, keys that are equal in different objects and numbers at the border are all fine."""
    check(body)
    json.loads(body)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**66), 2**66)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a\\", '"', "{", "\\u0061", "a" * 4_200, "\n" * 80]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "b", "\\", '"', "é"]), inner, max_size=4)
    ),
    max_leaves=12,
)


def acceptable(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(acceptable, value.values()))
    if isinstance(value, list):
        return all(map(acceptable, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or isinstance(value, bool) or -(2**63) <= value < 2**63


@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
@settings(deadline=None)
def test_judges_every_value_by_what_is_in_it(value: Any, is_ascii: bool, indent: int | None) -> None:
    """The scan reads bytes and not values; both views must agree whatever the layout and the escapes."""
    body = json.dumps(value, ensure_ascii=is_ascii, indent=indent).encode("utf-8", "surrogatepass")
    if acceptable(value):
        check(body)
    else:
        with pytest.raises(MalformedJsonError):
            check(body)


TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b'"a"',
    b'"b"',
    b"\\",
    b"1",
    b"1e999",
    b"NaN",
    b"true",
    b" ",
    b"\xff",
]


@given(st.lists(st.sampled_from(TOKENS), max_size=12).map(b"".join))
@settings(deadline=None, max_examples=300)
def test_the_quick_proof_passes_nothing_that_the_scan_refuses(body: bytes) -> None:
    """Small bodies skip the scan when a decoder in C finds them sound; that must never let more through."""
    if not json_gate._is_plainly_sound(body, 64, 1_000):
        return
    padded = body + b" " * json_gate._SMALL_BYTES  # too large for the proof
    check(padded)


@given(st.binary(max_size=40))
@settings(deadline=None)
def test_never_fails_but_with_an_error_of_ours(body: bytes) -> None:
    """Any bytes may come; the gate either passes them on or says why not."""
    try:
        check(body + b" " * json_gate._SMALL_BYTES)
    except StackError:
        return

"""What a JSON body must be before it is parsed: bounded, and free of what later layers cannot carry faithfully.

The gate reads the raw bytes token by token and stops at the first thing that it refuses: nesting, number of values,
NaN and Infinity, numbers that overflow, integers wider than 64 bits, duplicate keys, encodings other than UTF-8.
Grammar, lone surrogates and bad UTF-8 are refused by the parser behind it. Every step is short, so that a scan in a
thread lets the event loop run.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from typing import Any

from ..errors import MalformedJsonError, NestingTooDeepError, TooLargeError

_STEP = 65_536
"""The most bytes that one match may take, for the interpreter switches threads only between matches."""

_TOKEN = re.compile(
    rb"""[ \t\n\r,:]{0,65536}+(?:
        ([{\[])                                         # 1 a container opens
      | ([}\]])                                         # 2 a container closes
      | "([^"\\]{0,4096}+(?:\\.[^"\\]{0,64}+){0,64}+)   # 3 a string, as far as one step goes
         (" [ \t\n\r]{0,65536}+ :?+ )?                  # 4 its end, and the colon that makes it a key
      | (-?[0-9][0-9.eE+-]{0,65536}+)                   # 5 a number
      | ([^ \t\n\r,:"{}\[\]]{1,65536}+)                 # 6 a word
    )?""",
    re.DOTALL | re.VERBOSE,
)
_OPEN, _CLOSE, _LONG_STRING, _STRING, _NUMBER = 1, 2, 3, 4, 5
_ESCAPES = re.compile(rb'(?:[^"\\]{0,64}+\\.){0,4096}+', re.DOTALL)
_END_OF_STRING = re.compile(rb'"[ \t\n\r]{0,65536}+:?+')

_LITERALS = (b"true", b"false", b"null")
_NON_FINITE = (b"NaN", b"Infinity", b"-Infinity")
_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MIN_INTEGER, _MAX_INTEGER = -(2**63), 2**63 - 1
_MAX_NUMBER_BYTES = 1024
_MAX_BACKSLASHES = 3_000_000
"""The parser takes a string in one go, and escapes are what makes that slow: 8 million of them take 0.1 s."""
_SMALL_BYTES = 16_384


def check_json(body: bytes, *, max_depth: int, max_nodes: int) -> None:
    """Refuse a body that must not reach the parser; one that passes may still be bad grammar.

    Raises ``NestingTooDeepError`` past ``max_depth`` containers within one another, ``TooLargeError`` past
    ``max_nodes`` values (keys not counted), and ``MalformedJsonError`` for all else.
    """
    if _is_plainly_sound(body, max_depth, max_nodes):
        return
    if body.startswith(_BYTE_ORDER_MARKS) or b"\0" in body[:4]:
        raise MalformedJsonError("the body is not plain UTF-8; JSON travels as UTF-8 without a byte order mark")
    if len(body) > _MAX_BACKSLASHES and _count(body, b"\\") > _MAX_BACKSLASHES:
        raise TooLargeError(f"the body holds more than {_MAX_BACKSLASHES} backslashes; send plain UTF-8 unescaped")
    nodes = 0
    keys: set[bytes] | None = None
    enclosing: list[set[bytes] | None] = []
    position = 0
    while position < len(body):
        for token in _TOKEN.finditer(body, position):
            position = token.end()
            kind = token.lastindex
            if kind == _LONG_STRING:
                position = _end_of_long_string(body, position)
                end = _END_OF_STRING.match(body, position)
                position = end.end() if end else len(body)
                if end and _is_key(end[0]):
                    _add_key(keys, body[token.start(_LONG_STRING) : end.start()])
                else:
                    nodes += 1
                break
            if kind == _STRING and _is_key(token[_STRING]):
                _add_key(keys, token[_LONG_STRING])
            elif kind == _CLOSE:
                keys = enclosing.pop() if enclosing else None
            elif kind is not None:
                nodes += 1
                if nodes > max_nodes:
                    raise TooLargeError(f"the body holds more than {max_nodes} JSON values; split the request")
                if kind == _OPEN:
                    enclosing.append(keys)
                    if len(enclosing) > max_depth:
                        raise NestingTooDeepError(f"the body is nested deeper than {max_depth} levels")
                    keys = set() if token[_OPEN] == b"{" else None
                elif kind == _NUMBER:
                    _check_number(token[_NUMBER])
                elif kind != _STRING:
                    _check_word(token[kind])


def _count(body: bytes, byte: bytes) -> int:
    return sum(body.count(byte, start, start + _STEP) for start in range(0, len(body), _STEP))


def _is_plainly_sound(body: bytes, max_depth: int, max_nodes: int) -> bool:
    """Whether a small body passes by a quick proof in C; where it fails, the scan has the word and the reason."""
    if len(body) > _SMALL_BYTES or body.count(b"{") + body.count(b"[") > max_depth or 2 * max_nodes < len(body):
        return False
    try:
        _DECODER.decode(body.decode())
    except ValueError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError


def _short(digits: str) -> None:
    if len(digits) > 18:
        raise ValueError


def _finite(text: str) -> None:
    if math.isinf(float(text)):
        raise ValueError


def _never(text: str) -> None:
    raise ValueError


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_short, parse_float=_finite, parse_constant=_never)
_DECODE_STRING = json.JSONDecoder().raw_decode


def _is_key(end_of_string: bytes) -> bool:
    if len(end_of_string) > _STEP:
        raise MalformedJsonError(f"a string in the body is followed by {_STEP} or more characters of white space")
    return end_of_string.endswith(b":")


def _add_key(keys: set[bytes] | None, key: bytes) -> None:
    if keys is None:
        return  # outside of an object: the parser refuses it in its own words
    if b"\\" in key:
        try:
            key = _DECODE_STRING(f'"{key.decode()}"')[0].encode("utf-8", "surrogatepass")
        except ValueError:
            return  # as above
    if key in keys:
        raise MalformedJsonError("an object in the body has the same key twice; which value is meant cannot be known")
    keys.add(key)


def _check_number(text: bytes) -> None:
    if len(text) < 19 and b"e" not in text and b"E" not in text:
        return
    if len(text) > _MAX_NUMBER_BYTES:
        raise MalformedJsonError(f"a number in the body is written in more than {_MAX_NUMBER_BYTES} characters")
    try:
        if text.removeprefix(b"-").isdigit():
            if not _MIN_INTEGER <= int(text) <= _MAX_INTEGER:
                raise MalformedJsonError("an integer in the body is wider than 64 bits")
        elif math.isinf(float(text)):
            raise MalformedJsonError("a number in the body is too large for a 64-bit float")
    except ValueError:
        return  # not a number: the parser refuses it in its own words


def _check_word(word: bytes) -> None:
    if word in _NON_FINITE:
        raise MalformedJsonError("NaN and Infinity are not JSON (RFC 8259 section 6)")
    if word not in _LITERALS:
        raise MalformedJsonError("the body is not JSON: there is a word in it that is not true, false or null")


def _end_of_long_string(body: bytes, position: int) -> int:
    """The place of the quote that ends the string still open at ``position``; the body's end where there is none."""
    while position < len(body):
        limit = min(position + _STEP, len(body))
        quote = body.find(b'"', position, limit)
        backslash = body.find(b"\\", position, limit if quote < 0 else quote)
        if backslash >= 0:
            step = _ESCAPES.match(body, backslash)
            position = step.end() if step and step.end() > backslash else len(body)
        elif quote >= 0:
            return quote
        else:
            position = limit
    return len(body)

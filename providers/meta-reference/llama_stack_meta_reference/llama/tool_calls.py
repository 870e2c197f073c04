"""Finds the tool calls in what a Llama model writes, while it writes.

The parser reads one character after another and decides each as soon as it can, so a reply gives the same calls and the
same text however it is cut into pieces. Understood are all the ways in which Llama 3.x writes calls:

- ``{"name": "f", "parameters": {...}}`` (or ``"arguments"``, with or without ``"type": "function"``), several of
  them one after another, separated by white space, ``;`` or ``,``, or in a list;
- ``<function=f>{...}</function>``;
- ``[f(a=1, b="x"), g()]``, the form of Llama 3.2, with literal values only;
- after ``<|python_tag|>``: ``brave_search.call(query="...")``, any of the above, and otherwise code for the
  interpreter.

A call stands at the start of a line, at the start of the reply, or after another call. It counts only if it names
one of the tools at hand and is complete and valid (JSON as in RFC 8259, no key twice, numbers finite); a list
counts as a whole. Everything else is text and comes back as it was, apart from the separators around calls.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Generator, Sequence
from enum import Enum, auto
from itertools import groupby
from typing import TypeVar

from pydantic import ValidationError

from llama_stack.apis.common import Json, ToolCall, ToolDefinition

from .chat_format import BUILT_IN_NAMES, CODE_INTERPRETER, PYTHON_TAG
from .tokenizer import SpecialToken

MAX_HELD_CHARACTERS = 262_144
"""A call longer than this is text: no reply makes the parser hold more."""
MAX_DEPTH = 32
"""Brackets nested deeper than this inside a call make it text."""

T = TypeVar("T")
_Reading = Generator[None, str, T]
"""Takes characters one by one until it has read a ``T``; raises ``_NotACallError`` once it cannot be one."""

_KEYS = ("name", "parameters", "arguments", "type")
_SEARCHES = [name for name in dict.fromkeys(BUILT_IN_NAMES.values()) if name != CODE_INTERPRETER]
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_NAME_CHARACTERS = 255
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


class _NotACallError(Exception):
    """What has been read cannot become a call any more; ``unknown_tool`` if only because no such tool is at hand."""

    def __init__(self, unknown_tool: bool = False) -> None:
        self.unknown_tool = unknown_tool


class _Place(Enum):
    """Where in the reply the next character stands."""

    START = auto()
    TAG = auto()  # behind <|python_tag|>
    CALL = auto()  # behind a call
    LINE = auto()  # at the start of a line, or in the white space there
    TEXT = auto()
    CODE = auto()  # from <|python_tag|> to the end


class ToolCallParser:
    """Splits one reply into text and calls. Without ``tools`` everything is text."""

    def __init__(self, tools: Sequence[ToolDefinition]) -> None:
        # What the model may write, and whose call that is: the caller's own name wins over the model's name for it.
        self._names = {BUILT_IN_NAMES.get(tool.tool_name, tool.tool_name): tool.tool_name for tool in reversed(tools)}
        self._names |= {tool.tool_name: tool.tool_name for tool in tools}
        self._place = _Place.START
        self._reading: _Reading[list[ToolCall]] | None = None
        self._held: list[str] = []  # separators, then what may become a call
        self._out: list[str | ToolCall] = []

    def feed(self, piece: str) -> list[str | ToolCall]:
        """What has become certain with ``piece``: text and calls, in order.

        ``piece`` is text, or a ``SpecialToken``, of which only ``<|python_tag|>`` means anything here.
        """
        if isinstance(piece, SpecialToken):
            if piece == PYTHON_TAG and self._names:
                self._end()
                self._place = _Place.TAG
        elif not self._names:
            self._out.append(piece)
        else:
            position = 0
            while position < len(piece):
                if self._place is _Place.TEXT:
                    newline = piece.find("\n", position)
                    end = len(piece) if newline < 0 else newline + 1
                    self._out.append(piece[position:end])
                    self._place = _Place.TEXT if newline < 0 else _Place.LINE
                    position = end
                else:
                    self._step(piece[position])
                    position += 1
        return self._take()

    def finish(self, *, is_cut: bool = False) -> list[str | ToolCall]:
        """What was still held back, now that the reply has ended.

        Nothing but the end of a reply ends code. ``is_cut`` says that the model did not end it (``max_tokens`` did):
        half a program is no call, so it is text.
        """
        if is_cut and self._place in (_Place.TAG, _Place.CODE):
            self._release()
        self._end()
        self._place = _Place.START
        return self._take()

    def _step(self, character: str) -> None:
        """Place one character, unless it stands in the middle of a line of text."""
        if self._place is _Place.LINE and self._reading is None and character.isspace():
            self._out.append(character)
            return
        self._held.append(character)
        if len(self._held) > MAX_HELD_CHARACTERS:
            self._release()
        elif self._place is not _Place.CODE and (self._reading is not None or not self._is_separator(character)):
            self._advance(character)

    def _is_separator(self, character: str) -> bool:
        return character.isspace() or (self._place is _Place.CALL and character in ";,")

    def _advance(self, character: str) -> None:
        """Read on in what may become a call, or begin to."""
        try:
            if self._reading is None:
                self._reading = self._read_calls()
                next(self._reading)
            self._reading.send(character)
        except StopIteration as finished:
            self._out += finished.value
            self._held.clear()
            self._reading = None
            self._place = _Place.CALL
        except _NotACallError as error:
            self._refuse(error.unknown_tool)

    def _refuse(self, unknown_tool: bool = False) -> None:
        """What is held is no call: behind the tag it is code where there is an interpreter, otherwise text."""
        if self._place is _Place.TAG and not unknown_tool and CODE_INTERPRETER in self._names:
            self._reading = None
            self._place = _Place.CODE
        else:
            self._release()

    def _release(self) -> None:
        """Give up what is held, as text."""
        text = "".join(self._held)
        self._out.append(text)
        self._held.clear()
        self._reading = None
        _, newline, line = text.rpartition("\n")
        self._place = _Place.LINE if newline and not line.strip() else _Place.TEXT

    def _end(self) -> None:
        """Close what is open, for the reply ends here or a new ``<|python_tag|>`` begins."""
        if self._reading is not None:
            self._refuse()
        if self._place is _Place.CODE:
            code = "".join(self._held)
            self._out.append(ToolCall(tool_name=self._names[CODE_INTERPRETER], arguments={"code": code}))
        elif self._place is not _Place.CALL:
            self._release()
        self._held.clear()

    def _take(self) -> list[str | ToolCall]:
        """What there is to hand out, neighbouring texts joined."""
        out: list[str | ToolCall] = []
        for is_call, items in groupby(self._out, key=lambda item: isinstance(item, ToolCall)):
            texts = list(items)
            out += texts if is_call else filter(None, ["".join(map(str, texts))])
        self._out = []
        return out

    def _read_calls(self) -> _Reading[list[ToolCall]]:
        """The one kind of call that can begin with the next character, if there is one."""
        character = yield
        if character == "{":
            return [(yield from self._read_object())]
        if character == "[":
            return (yield from self._read_list())
        if character == "<":
            return (yield from self._read_tag())
        if self._place in (_Place.TAG, _Place.CALL):
            return [(yield from self._read_built_in(character))]
        raise _NotACallError

    def _read_object(self) -> _Reading[ToolCall]:
        """``{"name": ..., "parameters": ...}``, from behind the bracket."""
        keys: set[str] = set()
        name: str | None = None
        arguments: dict[str, Json] | None = None
        character = yield from _skip()
        while True:
            key = yield from _read_string(character, _KEYS)
            if key not in _KEYS or key in keys or (yield from _skip()) != ":":
                raise _NotACallError
            keys.add(key)
            character = yield from _skip()
            if key in ("parameters", "arguments"):
                if arguments is not None:
                    raise _NotACallError
                arguments = yield from _read_json_object(character)
            elif key == "type":
                if (yield from _read_string(character, ("function",))) != "function":
                    raise _NotACallError
            else:
                name = yield from _read_string(character)
                self._known(name)
            character = yield from _skip()
            if character == "}":
                break
            if character != ",":
                raise _NotACallError
            character = yield from _skip()
        return self._call(name, arguments)

    def _read_list(self) -> _Reading[list[ToolCall]]:
        """From behind ``[``: JSON objects, or calls in Python's notation."""
        calls: list[ToolCall] = []
        character = yield from _skip()
        while True:
            calls.append((yield from self._read_object() if character == "{" else self._read_pythonic(character)))
            character = yield from _skip()
            if character == "]":
                return calls
            if character != ",":
                raise _NotACallError
            character = yield from _skip()

    def _read_pythonic(self, character: str) -> _Reading[ToolCall]:
        """``f(a=1, b="x")``, of which ``character`` is the first. The name need not be one that Python allows."""
        name = ""
        while character != "(":
            name += character
            if not any(known.startswith(name) for known in self._names):
                raise _NotACallError
            character = yield
        self._known(name)
        return self._call(name, _keywords((yield from _read_brackets("(", "\"'"))))

    def _read_tag(self) -> _Reading[list[ToolCall]]:
        """From behind ``<``: a call in a function tag, or, behind a call, that tag's end."""
        character = yield
        if character == "/" and self._place is _Place.CALL:
            yield from _expect("function>")
            return []
        yield from _expect("function=", character)
        name = ""
        while (character := (yield)) != ">":
            name += character
            if not any(known.startswith(name) for known in self._names):
                raise _NotACallError(unknown_tool=True)
        self._known(name)
        return [self._call(name, (yield from _read_json_object((yield from _skip()))))]

    def _read_built_in(self, character: str) -> _Reading[ToolCall]:
        """``brave_search.call(query="...")``, of which ``character`` is the first."""
        name = ""
        while character != ".":
            name += character
            if not any(known.startswith(name) for known in _SEARCHES):
                raise _NotACallError
            character = yield
        if name not in _SEARCHES:
            raise _NotACallError
        yield from _expect("call(")
        arguments = _keywords((yield from _read_brackets("(", "\"'")))
        self._known(name)
        return self._call(name, arguments)

    def _known(self, name: str) -> None:
        if name not in self._names:
            raise _NotACallError(unknown_tool=True)

    def _call(self, name: str | None, arguments: dict[str, Json] | None) -> ToolCall:
        if name is None or arguments is None:
            raise _NotACallError
        try:
            return ToolCall(tool_name=self._names[name], arguments=arguments)
        except ValidationError as error:
            raise _NotACallError from error


def _skip() -> _Reading[str]:
    """The next character that is no white space (as JSON has it)."""
    while (character := (yield)) in " \t\r\n":
        pass
    return character


def _expect(text: str, first: str | None = None) -> _Reading[None]:
    """Exactly ``text``, whose ``first`` character may have been read already."""
    for expected in text:
        character = first if first is not None else (yield)
        first = None
        if character != expected:
            raise _NotACallError


def _read_string(first: str, allowed: Sequence[str] = ()) -> _Reading[str]:
    """A JSON string of at most 255 characters; where ``allowed`` is given, one that may still become one of these."""
    if first != '"':
        raise _NotACallError
    raw = ""
    while (character := (yield)) != '"':
        raw += character
        if character == "\\":
            raw += yield
        if len(raw) > _NAME_CHARACTERS or (allowed and not any(word.startswith(raw) for word in allowed)):
            raise _NotACallError
    text = _load(f'"{raw}"')
    assert isinstance(text, str)
    return text


def _read_json_object(first: str) -> _Reading[dict[str, Json]]:
    if first != "{":
        raise _NotACallError
    value = _load((yield from _read_brackets("{", '"')))
    if not isinstance(value, dict):
        raise _NotACallError
    return value


def _read_brackets(opening: str, quotes: str) -> _Reading[str]:
    """All from ``opening`` (already read) to the bracket that closes it. Brackets in strings do not count."""
    text = [opening]
    closing = [_CLOSING[opening]]
    quote = ""
    while closing:
        character = yield
        text.append(character)
        if quote:
            if character == "\\":
                text.append((yield))
            elif character == quote:
                quote = ""
            elif character < " ":
                raise _NotACallError
        elif character in quotes:
            quote = character
        elif character in _CLOSING:
            closing.append(_CLOSING[character])
            if len(closing) > MAX_DEPTH:
                raise _NotACallError
        elif character in ")]}" and character != closing.pop():
            raise _NotACallError
    return "".join(text)


def _load(text: str) -> Json:
    """JSON by the letter. Python's reader is laxer: it takes NaN, and of two equal keys the last."""
    try:
        value: Json = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except ValueError as error:
        raise _NotACallError from error
    return _carried(value)


def _object(pairs: Sequence[tuple[str, Json]]) -> dict[str, Json]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is given twice")
    return value


def _refuse_constant(name: str) -> Json:
    raise ValueError(f"{name} is no JSON")


def _carried(value: Json) -> Json:
    """``value`` if it can travel as JSON: no infinite number (1e999), no half of a surrogate pair."""
    if isinstance(value, float) and not math.isfinite(value):
        raise _NotACallError
    if isinstance(value, str) and _SURROGATE.search(value):
        raise _NotACallError
    if isinstance(value, dict):
        for key, item in value.items():
            _carried(key)
            _carried(item)
    elif isinstance(value, list):
        for item in value:
            _carried(item)
    return value


def _keywords(arguments: str) -> dict[str, Json]:
    """The keyword arguments in ``(a=1, b="x")``: literals only, by Python's grammar; nothing is evaluated."""
    # Python warns of a backslash that escapes nothing and keeps it; so it is kept here without the warning.
    kept = _ESCAPE.sub(lambda pair: pair[0] if pair[1] in "\\'\"abfnrtvxuU" else "\\" + pair[0], arguments)
    try:
        call = ast.parse(f"f{kept}", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _NotACallError from error
    if not isinstance(call, ast.Call) or call.args:
        raise _NotACallError
    pairs = [(keyword.arg, _literal(keyword.value)) for keyword in call.keywords]
    named = {name: value for name, value in pairs if name is not None}
    if len(named) != len(pairs):
        raise _NotACallError
    return {name: _carried(value) for name, value in named.items()}


def _literal(node: ast.expr) -> Json:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id="true" | "false" | "null" as word):  # models mix JSON into Python
            return {"true": True, "false": False, "null": None}[word]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            members = {
                key.value: _literal(value)
                for key, value in zip(keys, values, strict=True)
                if isinstance(key, ast.Constant) and isinstance(key.value, str)
            }
            if len(members) == len(keys):
                return members
    raise _NotACallError

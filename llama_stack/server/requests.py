"""From a request to the arguments of an operation: query, body, and all that must hold for them.

A body passes the JSON gate and is validated by the contract's own adapter; the bodies of faces pass the same gate.
Large ones are looked at in a thread, so that the event loop keeps running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.types import Message, Receive

from ..apis.contract import Operation
from ..distribution import ServerConfig, ServerLimits
from ..errors import (
    FieldFault,
    InvalidRequestError,
    MalformedJsonError,
    UnsupportedMediaError,
    nearest,
)
from .exchange import ClientGoneError, Exchange
from .faults import of_faults, parameter_fault, pointer, refusal
from .json_gate import check_json
from .replies import accepted

INLINE_BYTES = 32_768
"""Bodies up to this size are checked on the event loop: they take a few milliseconds at worst."""
MAX_QUERY_FIELDS = 64
_T = TypeVar("_T")


def gated(receive: Receive, limits: ServerLimits, executor: Executor) -> Receive:
    """``receive`` for a face that takes JSON: the body comes in one piece, once it has passed the gate and parses.

    Raises ``MalformedJsonError`` or ``TooLargeError`` where the body is asked for.
    """
    is_read = False

    async def receive_gated() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        body = await _whole_body(receive)
        await _examined(_check_parses, body, limits, executor=executor)
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_gated


class Reader:
    """Reads the requests of one operation."""

    def __init__(self, operation: Operation, config: ServerConfig, executor: Executor) -> None:
        self._operation = operation
        self._limits = config.limits
        self._is_strict = config.strict_requests and not operation.is_extension
        self._executor = executor

    async def read(self, exchange: Exchange) -> dict[str, Any]:
        """The operation's arguments by name. Raises ``RequestError`` for whatever is wrong with the request."""
        operation = self._operation
        query: bytes = exchange.scope["query_string"]
        arguments = self._query(query) if query or operation.query else {}
        follow = operation.stream_parameter
        if follow and follow not in arguments and _accepts_events_alone(exchange):
            arguments[follow] = True
        if operation.body is None:
            self._refuse_body(exchange)
            return arguments
        self._check_media(exchange)
        body = await _whole_body(exchange.next_message)
        arguments[operation.body.name] = await _examined(self._validated, body, executor=self._executor)
        return arguments

    def _query(self, query: bytes) -> dict[str, Any]:
        known = self._operation.query
        try:
            pairs = parse_qsl(
                query.decode("ascii"),
                keep_blank_values=True,
                strict_parsing=bool(query),
                errors="strict",
                max_num_fields=MAX_QUERY_FIELDS,
            )
        except ValueError as error:
            raise InvalidRequestError("the query string is not a list of name=value pairs in UTF-8") from error
        given: dict[str, str] = {}
        faults: list[FieldFault] = []
        for name, value in pairs:
            if name not in known:
                faults.append(
                    FieldFault(f"?{name[:64]}", "unknown_key", f"is not a parameter here{_hint(name, known)}")
                )
            elif name in given:
                faults.append(FieldFault(f"?{name}", "repeated", "is given more than once"))
            given[name] = value
        arguments: dict[str, Any] = {}
        for name, parameter in known.items():
            if name in given:
                try:
                    arguments[name] = parameter.adapter.validate_strings(given[name], strict=True)
                except ValidationError as error:
                    faults.append(parameter_fault(name, error))
            elif parameter.is_required:
                faults.append(FieldFault(f"?{name}", "missing", "is required"))
        if faults:
            raise of_faults(faults)
        return arguments

    def _refuse_body(self, exchange: Exchange) -> None:
        if exchange.has_body:
            raise InvalidRequestError(f"{self._operation.key} takes no body; send its parameters in the query")

    def _check_media(self, exchange: Exchange) -> None:
        media = exchange.headers.get(b"content-type", b"")
        if media != b"application/json":
            name, _, parameters = media.decode("latin-1").lower().partition(";")
            charset = parameters.replace(" ", "").replace('"', "")
            if name.strip() != "application/json" or charset not in ("", "charset=utf-8"):
                raise UnsupportedMediaError("the body should be sent with content-type: application/json")
        if exchange.headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise UnsupportedMediaError("the body should be sent as it is, without a content-encoding")

    def _validated(self, body: bytes) -> Any:
        parameter = self._operation.body
        assert parameter is not None
        _check_gate(body, self._limits)
        try:
            value = parameter.adapter.validate_json(body)
        except ValidationError as error:
            raise refusal(error, body, parameter.annotation) from None
        if self._is_strict:
            absent = _absent(value, ())
            if absent:
                raise of_faults([FieldFault(pointer(path), "missing", "is required") for path in absent])
        return value


async def _whole_body(receive: Receive) -> bytes:
    pieces: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _examined(examine: Callable[..., _T], body: bytes, *rest: Any, executor: Executor) -> _T:
    if len(body) <= INLINE_BYTES:
        return examine(body, *rest)
    return await asyncio.get_running_loop().run_in_executor(executor, examine, body, *rest)


def _check_gate(body: bytes, limits: ServerLimits) -> None:
    if not body:
        raise MalformedJsonError("the body is empty; it should be JSON")
    check_json(body, max_depth=limits.max_json_depth, max_nodes=limits.max_json_nodes)


def _check_parses(body: bytes, limits: ServerLimits) -> None:
    _check_gate(body, limits)
    try:
        from_json(body)
    except ValueError as error:
        raise MalformedJsonError(f"the body is not valid JSON: {error}") from None


def _accepts_events_alone(exchange: Exchange) -> bool:
    header = exchange.headers.get(b"accept")
    return header is not None and accepted(header) == {"text/event-stream"}


def _hint(name: str, known: Mapping[str, Any]) -> str:
    return nearest(name[:64], known)


def _absent(value: Any, path: tuple[str | int, ...]) -> list[tuple[str | int, ...]]:
    """The places of fields that the draft requires and gives a default, and that a request left out (spec rule G1)."""
    if isinstance(value, list):
        return [found for index, item in enumerate(value) for found in _absent(item, (*path, index))]
    if not isinstance(value, BaseModel):
        return []
    found: list[tuple[str | int, ...]] = []
    for name, field in type(value).model_fields.items():
        if name in value.model_fields_set:
            found += _absent(getattr(value, name), (*path, name))
        elif field.get_default(call_default_factory=False) is not None or field.default_factory is not None:
            found.append((*path, name))
    return found

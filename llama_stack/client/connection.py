"""One server as seen over HTTP: sends an operation's arguments, and reads its reply into the contract's types."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
from pydantic import JsonValue, TypeAdapter, ValidationError

from .. import __version__
from ..apis.common import StopReason
from ..apis.config import server_url
from ..apis.contract import Operation, Shape
from ..errors import DeadlineExceededError, FieldFault, InvalidRequestError, UpstreamError
from .problems import foreign_refusal, read_problem
from .replies import Stream
from .wire import events, lines

MAX_REPLY_BYTES = 256 * 1024 * 1024
_MAX_PROBLEM_BYTES = 1024 * 1024
_MAX_DEADLINE_MS = 600_000
_IDLE_CONNECTIONS = 32
_KEEP_ALIVE_SECONDS = 10.0  # less than the 15 s after which a server closes an idle connection, so that none is stale
_JSON = "application/json"
_JSON_LINES = "application/jsonl"
_EVENTS = "text/event-stream"
_JSON_VALUE: TypeAdapter[JsonValue] = TypeAdapter(JsonValue)


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """How long to wait for a server, in seconds; ``None`` waits for ever."""

    connect_seconds: float | None = 5.0
    """Until a connection is made."""
    read_seconds: float | None = 600.0
    """Between two pieces of an answer; a plain answer arrives in one piece, when all of it has been generated."""
    answer_seconds: float | None = None
    """Until the whole answer, or the first item of a stream, is here. The server is told, and stops working then."""


DEFAULT_TIMEOUTS = Timeouts()


class Connection:
    """Operations of any contract against one server. Connections are reused; close it when done."""

    def __init__(
        self,
        base_url: str,
        *,
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
        api_key: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        trust_env: bool = False,
        max_reply_bytes: int = MAX_REPLY_BYTES,
        name: str | None = None,
    ) -> None:
        """``name`` is what error messages call the server, for people who are not to know its address."""
        self._base_url = server_url(base_url).rstrip("/")
        self._name = name or self._base_url
        self._timeouts = timeouts
        self._max_bytes = max_reply_bytes
        headers = {"user-agent": f"llama-stack/{__version__}", "accept-encoding": "identity"}
        if api_key is not None:
            headers["authorization"] = f"Bearer {api_key}"
        self._http = httpx2.AsyncClient(
            headers=headers,
            # A TLS context costs tens of milliseconds; plain HTTP needs none, for redirects are not followed.
            verify=(ssl_context or True) if self._base_url.startswith("https:") else False,
            timeout=httpx2.Timeout(timeouts.read_seconds, connect=timeouts.connect_seconds, pool=None),
            limits=httpx2.Limits(
                max_connections=None,
                max_keepalive_connections=_IDLE_CONNECTIONS,
                keepalive_expiry=_KEEP_ALIVE_SECONDS,
            ),
            trust_env=trust_env,
        )

    async def aclose(self) -> None:
        """Close every connection; streams that are still open end with an error."""
        await self._http.aclose()

    async def call(self, operation: Operation, arguments: Mapping[str, Any]) -> Any:
        """The operation's reply: ``None``, a value, or a ``Stream``.

        Raises ``InvalidRequestError`` for arguments that the contract refuses, before anything is sent; the error that
        the server describes, as its own class; ``UpstreamError`` when the server cannot be reached, breaks off or does
        not keep the contract; ``DeadlineExceededError`` when it takes longer than the timeouts allow.
        """
        values, query, body = encode(operation, arguments)
        wants_stream = operation.wants_stream(values)
        if operation.shape is Shape.LINES or wants_stream:
            items = self._items(operation, _EVENTS if wants_stream else _JSON_LINES, query, body)
            async with self._deadline(operation.key):
                await anext(items)  # up to the answer's headers, so that a refusal is raised here
            return Stream(items)
        async with self._deadline(operation.key), self._answer(operation.key, _JSON, query, body) as answer:
            await self._refuse(answer, operation.key, _JSON if operation.shape is not Shape.VOID else None)
            data = await self._whole(answer, operation.key, self._max_bytes)
        return None if operation.shape is Shape.VOID else self._read(operation.result_adapter, data, operation.key)

    async def get_json(self, path: str) -> tuple[int, JsonValue]:
        """Status and body of a GET on a path that belongs to no contract, such as ``/health/ready``."""
        key = f"GET {path}"
        async with self._deadline(key), self._answer(key, _JSON, {}, None) as answer:
            self._refuse_redirect(answer, key)
            data = await self._whole(answer, key, self._max_bytes)
        return answer.status_code, self._read(_JSON_VALUE, data, key)

    async def _items(
        self, operation: Operation, accept: str, query: Mapping[str, str], body: bytes | None
    ) -> AsyncGenerator[Any]:
        """Yield ``None`` when the answer begins, then each item."""
        key = operation.key
        async with self._answer(key, accept, query, body) as answer:
            await self._refuse(answer, key, accept)
            yield None
            if accept == _JSON_LINES:
                async for line in lines(answer.aiter_raw(), max_bytes=self._max_bytes):
                    yield self._read(operation.result_adapter, line, key)
                return
            last: Any = None
            async for event in events(answer.aiter_raw(), max_bytes=self._max_bytes):
                if event.kind == "error":
                    raise read_problem(event.data) or UpstreamError(f"{self._name} broke off its answer to {key}")
                last = self._read(operation.chunk_adapter, event.data, key)
                yield last
            if _tells_its_end(operation) and (last is None or last.stop_reason in (None, StopReason.NOT_STOPPED)):
                raise UpstreamError(f"{self._name} ended its answer to {key} without the last chunk")

    @asynccontextmanager
    async def _answer(
        self, key: str, accept: str, query: Mapping[str, str], body: bytes | None
    ) -> AsyncIterator[httpx2.Response]:
        """Send a request; the block reads the answer. Failures of the connection become errors of ours."""
        method, path = key.split(" ", 1)
        headers = {"accept": accept}
        if body is not None:
            headers["content-type"] = _JSON
        if self._timeouts.answer_seconds is not None:
            headers["x-deadline-ms"] = str(min(_MAX_DEADLINE_MS, max(1, int(self._timeouts.answer_seconds * 1000))))
        try:
            async with self._http.stream(
                method, self._base_url + path, params=query or None, content=body, headers=headers
            ) as answer:
                yield answer
        except (httpx2.InvalidURL, httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            raise UpstreamError(f"cannot connect to {self._name}{self._because(error)}") from error
        except httpx2.TimeoutException as error:
            waited = f"{self._timeouts.read_seconds:g} s"
            raise DeadlineExceededError(f"{self._name} sent nothing for {waited} in answer to {key}") from error
        except httpx2.TransportError as error:
            raise UpstreamError(f"the connection to {self._name} broke during {key}{self._because(error)}") from error

    @asynccontextmanager
    async def _deadline(self, key: str) -> AsyncIterator[None]:
        deadline = asyncio.timeout(self._timeouts.answer_seconds)
        try:
            async with deadline:
                yield
        except TimeoutError as error:
            if not deadline.expired():
                raise
            waited = f"{self._timeouts.answer_seconds:g} s"
            raise DeadlineExceededError(f"{self._name} did not answer {key} in {waited}") from error

    async def _refuse(self, answer: httpx2.Response, key: str, media_type: str | None) -> None:
        """Raise what an answer says that is no success; ``media_type`` is what a success must be."""
        self._refuse_redirect(answer, key)
        request_id = answer.headers.get("x-request-id")
        if not answer.is_success:
            data = await self._whole(answer, key, _MAX_PROBLEM_BYTES)
            retry_after = answer.headers.get("retry-after", "")
            problem = read_problem(
                data, request_id=request_id, retry_after_seconds=int(retry_after) if retry_after.isdecimal() else None
            )
            raise problem or foreign_refusal(answer.status_code, self._name, key, request_id=request_id)
        found = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type is not None and found != media_type:
            raise UpstreamError(
                f"{self._name} answered {key} with {found or 'no content type'} in place of {media_type}",
                request_id=request_id,
            )
        encoding = answer.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise UpstreamError(f"{self._name} answered {key} in the encoding {encoding!r}, which was not asked for")

    def _refuse_redirect(self, answer: httpx2.Response, key: str) -> None:
        if answer.is_redirect:
            where = f" to {answer.headers.get('location', 'nowhere')}" if self._shows_hosts else ""
            raise UpstreamError(
                f"{self._name} redirects {key}{where}; use the address that it names",
                request_id=answer.headers.get("x-request-id"),
            )

    async def _whole(self, answer: httpx2.Response, key: str, max_bytes: int) -> bytes:
        data = bytearray()
        async for piece in answer.aiter_raw():
            data += piece
            if len(data) > max_bytes:
                raise UpstreamError(f"{self._name} answered {key} with more than {max_bytes} bytes")
        return bytes(data)

    def _read(self, adapter: TypeAdapter[Any], data: bytes, key: str) -> Any:
        try:
            return adapter.validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            raise read_problem(data) or UpstreamError(
                f"{self._name} answered {key} with what its contract does not allow: "
                f"{_pointer(first['loc']) or 'the value'}: {first['msg']}"
            ) from None

    def _because(self, error: httpx2.HTTPError | httpx2.InvalidURL) -> str:
        return f": {str(error) or type(error).__name__}" if self._shows_hosts else ""

    @property
    def _shows_hosts(self) -> bool:
        """Whether errors go to people who know which host is meant."""
        return self._name == self._base_url


def encode(operation: Operation, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], bytes | None]:
    """The arguments as the contract's types, as a query and as a body."""
    values: dict[str, Any] = {}
    query: dict[str, str] = {}
    body: bytes | None = None
    faults: list[FieldFault] = []
    for parameter in (*operation.query.values(), *((operation.body,) if operation.body else ())):
        is_body = parameter is operation.body
        try:
            value = values[parameter.name] = parameter.adapter.validate_python(arguments[parameter.name])
        except ValidationError as error:
            faults += [
                FieldFault(_pointer(e["loc"]) if is_body else f"?{parameter.name}", e["type"], e["msg"])
                for e in error.errors(include_url=False, include_input=False, include_context=False)
            ]
            continue
        if is_body:
            body = parameter.adapter.dump_json(value, exclude_none=True)
        elif value != parameter.default:  # what is left at its default may be unknown to an older server
            sent = parameter.adapter.dump_python(value, mode="json")
            query[parameter.name] = sent if isinstance(sent, str) else json.dumps(sent)
    if faults:
        shown = "; ".join(f"{fault.pointer or 'the body'}: {fault.detail}" for fault in faults[:5])
        raise InvalidRequestError(f"{operation.key} was not sent: {shown}", faults=faults)
    return values, query, body


def _pointer(location: tuple[int | str, ...]) -> str:
    return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in location)


def _tells_its_end(operation: Operation) -> bool:
    return "stop_reason" in getattr(operation.chunk, "model_fields", ())

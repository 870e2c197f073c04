"""Checks that follow from a contract alone, so that an API which a plugin brings is held to them too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ...apis import Api, Operation, Shape, operations
from ...apis.common import Schema
from ...client.connection import encode
from ...errors import RequestError, ServiceError, StackError, UpstreamError
from ..samples import arguments
from .checks import Check, Skipped
from .subject import Subject

_PROBLEM = "application/problem+json"


def checks(api: type[Api]) -> Iterator[Check]:
    """The checks of an API."""
    rule = "A start and a stop leave no thread, no open file, no process and no task behind."
    yield Check(api, f"{api.name}.it_starts_and_stops_without_leaving_anything", rule, _starts_and_stops)
    for operation in operations(api):
        yield from _checks_of(operation)


async def _starts_and_stops(subject: Subject) -> None:
    if subject.start_and_stop is None:
        raise Skipped("the server is not this process's to stop")
    left = await subject.start_and_stop()
    assert not left, f"left behind: {', '.join(left)}"


def _checks_of(operation: Operation) -> Iterator[Check]:
    name = f"{operation.api.name}.{operation.name}"
    yield Check(
        operation.api,
        f"{name}.answers_in_kind",
        f"{operation.key} answers a valid request as the contract says, or with an error that has a name",
        _answers_in_kind(operation),
    )
    for tried, rule, is_of_body in (
        (_no_json, "refuses a body that is no JSON with 400", True),
        (_wrong_kind, "refuses a body of another content type with 415", True),
        (_nothing, "refuses a request without what it needs with 422", False),
        (_surprise, "refuses a key that is not in the contract with 422 and names it", True),
        (_wrong_method, "answers another method with 405 and says which are allowed", False),
    ):
        if operation.body is not None or not is_of_body:
            rule = f"{operation.key} {rule}"
            yield Check(operation.api, f"{name}.{tried.__name__.strip('_')}", rule, tried(operation), is_of_server=True)


def _answers_in_kind(operation: Operation) -> Any:
    async def run(subject: Subject) -> None:
        call = getattr(subject.api(operation.api), operation.name)
        try:
            answer = await call(**arguments(operation))
            if operation.shape is Shape.LINES:
                [item async for item in answer]
        except UpstreamError as error:  # the client's own word for an answer that it cannot read
            raise AssertionError(error.detail) from error
        except (RequestError, ServiceError):
            return
        except StackError as error:
            raise AssertionError(f"{error.status} {error.code}: {error.detail}") from error

    return run


def _given(operation: Operation) -> dict[str, Any]:
    """Valid arguments, with what may be left out at its default."""
    return {name: p.default for name, p in operation.query.items() if not p.is_required} | arguments(operation)


def _no_json(operation: Operation) -> Any:
    async def run(subject: Subject) -> None:
        await _refused(subject, operation, 400, content=b'{"a":', kind="application/json")

    return run


def _wrong_kind(operation: Operation) -> Any:
    async def run(subject: Subject) -> None:
        await _refused(subject, operation, 415, content=b"a=1", kind="application/x-www-form-urlencoded")

    return run


def _nothing(operation: Operation) -> Any:
    async def run(subject: Subject) -> None:
        needed = [*operation.query.values(), *([operation.body] if operation.body else [])]
        if not any(parameter.is_required for parameter in needed):
            raise Skipped("it needs nothing")
        reply = await subject.http.request(operation.method, operation.path)
        assert reply.status_code in (400, 415, 422), f"{reply.status_code} for an empty request"
        _problem(reply)

    return run


def _surprise(operation: Operation) -> Any:
    async def run(subject: Subject) -> None:
        given = _given(operation)
        assert operation.body is not None
        if not isinstance(given[operation.body.name], Schema):
            raise Skipped("its body is a list")
        _, query, body = encode(operation, given)
        value = json.loads(body or b"{}") | {"surprise": 1}
        problem = await _refused(
            subject, operation, 422, content=json.dumps(value).encode(), kind="application/json", query=query
        )
        assert "surprise" in json.dumps(problem), "the refusal does not name the key"

    return run


def _wrong_method(operation: Operation) -> Any:
    async def run(subject: Subject) -> None:
        reply = await subject.http.request("PUT", operation.path, content=b"{}")
        assert reply.status_code == 405, f"{reply.status_code} for PUT {operation.path}"
        allowed = {word.strip() for word in reply.headers.get("allow", "").split(",")}
        assert operation.method in allowed, f"Allow is {sorted(allowed)}"
        _problem(reply)

    return run


async def _refused(
    subject: Subject,
    operation: Operation,
    status: int,
    *,
    content: bytes,
    kind: str,
    query: dict[str, str] | None = None,
) -> dict[str, Any]:
    if query is None:
        _, query, _ = encode(operation, _given(operation))
    reply = await subject.http.request(
        operation.method, operation.path, params=query, content=content, headers={"content-type": kind}
    )
    if reply.status_code == 501:
        raise Skipped("it is not provided")
    assert reply.status_code == status, f"expected {status}, got {reply.status_code}: {reply.text[:200]}"
    return _problem(reply)


def _problem(reply: Any) -> dict[str, Any]:
    """The problem document of a refusal, which has the members of RFC 9457 and OpenAI's ``error``."""
    kind = reply.headers.get("content-type", "").partition(";")[0]
    assert kind == _PROBLEM, f"the refusal is {kind or 'without a content type'}, not {_PROBLEM}"
    problem: dict[str, Any] = reply.json()
    missing = {"type", "title", "status", "detail", "error"} - problem.keys()
    assert not missing, f"the problem document lacks {sorted(missing)}"
    assert problem["status"] == reply.status_code, "its status is not the reply's"
    assert {"message", "type", "code"} <= problem["error"].keys(), "its error lacks message, type or code"
    return problem

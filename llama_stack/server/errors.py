"""The one body that every failure has: an RFC 9457 problem document with an OpenAI-shaped ``error`` member.

Only here does an error become HTTP. The text of a ``StackError`` was written for its caller and is shown; anything
else is our own bug, and its caller learns only the id under which it is logged.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import (
    ConflictError,
    DeadlineExceededError,
    FieldFault,
    ForbiddenError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    NotProvidedError,
    RateLimitedError,
    RequestError,
    RequestTimeoutError,
    SetupError,
    StackError,
    StorageFullError,
    TooLargeError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedMediaError,
    UpstreamError,
)

Headers = list[tuple[bytes, bytes]]

PROBLEM_MEDIA_TYPE = b"application/problem+json"
MAX_FAULTS = 20
"""Faults named in one answer; the detail still counts them all."""

_BY_STATUS: dict[int, type[StackError]] = {
    400: RequestError,
    401: UnauthenticatedError,
    403: ForbiddenError,
    404: NotFoundError,
    408: RequestTimeoutError,
    409: ConflictError,
    413: TooLargeError,
    415: UnsupportedMediaError,
    422: InvalidRequestError,
    429: RateLimitedError,
    501: NotProvidedError,
    502: UpstreamError,
    503: UnavailableError,
    504: DeadlineExceededError,
    507: StorageFullError,
}


def shown(error: BaseException) -> StackError:
    """The error as its caller may see it: itself when it was written for a caller, else a generic internal error."""
    if isinstance(error, StackError) and not (isinstance(error, SetupError) and error.status >= 500):
        return error
    return StackError("something went wrong on our side; the server's log has it under this request's id")


def of_status(status: int, detail: str) -> StackError:
    """An error for a status that a framework or a face chose without one of our errors."""
    found = _BY_STATUS.get(status)
    if found is not None:
        return found(detail)
    if 400 <= status < 500:
        refused: StackError = type("RefusedError", (RequestError,), {"status": status})(detail)
        return refused
    return StackError(detail)


def problem(error: BaseException, request_id: str) -> dict[str, Any]:
    """The problem document of an error (RFC 9457 section 3.1; the members of RELIABILITY's error contract)."""
    error = shown(error)
    param = error.param or (_dotted(error.faults[0].pointer) if error.faults else None)
    document: dict[str, Any] = {
        "type": f"urn:llama-stack:error:{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "instance": f"urn:request:{request_id}",
    }
    if error.faults:
        document["errors"] = [_fault(fault) for fault in error.faults[:MAX_FAULTS]]
    document.update(error.extra)
    document["error"] = {"message": error.detail, "type": error.kind, "code": error.code, "param": param}
    return document


def problem_bytes(error: BaseException, request_id: str) -> bytes:
    """The problem document as compact JSON on one line, ready for a body, an event or a line."""
    # ``str`` for members of a provider's making: no failure may keep us from telling of another
    return json.dumps(problem(error, request_id), separators=(",", ":"), default=str).encode()


def problem_headers(error: BaseException) -> Headers:
    """The headers that go with the status of an error, the content type among them."""
    error = shown(error)
    headers: Headers = [(b"content-type", PROBLEM_MEDIA_TYPE)]
    if error.retry_after_seconds is not None:
        headers.append((b"retry-after", b"%d" % max(1, error.retry_after_seconds)))
    if isinstance(error, MethodNotAllowedError):
        headers.append((b"allow", ", ".join(error.allowed).encode()))
    if isinstance(error, UnauthenticatedError):
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def _fault(fault: FieldFault) -> dict[str, Any]:
    described: dict[str, Any] = {"pointer": fault.pointer, "code": fault.code, "detail": fault.detail}
    if fault.limit is not None:
        described["limit"] = fault.limit
    return described


def _dotted(pointer: str) -> str:
    """A JSON pointer as OpenAI's ``param`` writes it: ``/dialog/message/role`` becomes ``dialog.message.role``."""
    return pointer.lstrip("?/").replace("/", ".").replace("~1", "/").replace("~0", "~")

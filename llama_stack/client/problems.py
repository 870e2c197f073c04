"""From a server's refusal back to the error that its provider raised (the contract is in ``docs/errors.md``)."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from ..errors import (
    DeadlineExceededError,
    FieldFault,
    NotProvidedError,
    OverloadedError,
    RequestTimeoutError,
    StackError,
    TooLargeError,
    UnauthenticatedError,
    UpstreamError,
)

PREFIX = "urn:llama-stack:error:"
REQUEST_PREFIX = "urn:request:"

_BY_STATUS: Mapping[int, type[StackError]] = {
    401: UnauthenticatedError,
    408: RequestTimeoutError,
    413: TooLargeError,
    503: OverloadedError,
    504: DeadlineExceededError,
}
"""What a refusal means that comes from something in front of the stack, such as a proxy, in a shape of its own."""


class _Tolerant(BaseModel):
    """A problem may come from a newer server: what we do not know is kept and not refused."""

    model_config = ConfigDict(extra="allow")


class _Fault(_Tolerant):
    pointer: str = ""
    code: str = ""
    detail: str = ""
    limit: float | None = None


class _Envelope(_Tolerant):
    param: str | None = None


class _Problem(_Tolerant):
    type: str
    title: str = ""
    status: int
    detail: str
    instance: str = ""
    errors: list[_Fault] = []
    error: _Envelope = _Envelope()


def read_problem(
    data: bytes, *, request_id: str | None = None, retry_after_seconds: int | None = None
) -> StackError | None:
    """The error that a problem document describes, as the class its provider raised; ``None`` if it is not one of ours.

    Where the document names its own request, that id is kept instead of ``request_id``.
    """
    try:
        problem = _Problem.model_validate_json(data)
    except ValidationError:
        return None
    if not problem.type.startswith(PREFIX):
        return None
    code = problem.type.removeprefix(PREFIX)
    if code in ("route_not_found", "method_not_allowed"):
        # The request was made from the contract, so the route is missing because that server lacks the operation.
        return NotProvidedError(f"not served there: {problem.detail}", request_id=_request_id(problem, request_id))
    extra: dict[str, JsonValue] = dict(problem.model_extra or {})
    retry_after = extra.pop("retry_after_seconds", None)
    return StackError.revive(
        code,
        problem.detail,
        status=problem.status,
        param=problem.error.param,
        faults=[FieldFault(f.pointer, f.code, f.detail, f.limit) for f in problem.errors],
        retry_after_seconds=retry_after_seconds or (retry_after if isinstance(retry_after, int) else None),
        extra=extra,
        request_id=_request_id(problem, request_id),
    )


def foreign_refusal(status: int, server: str, key: str, *, request_id: str | None) -> StackError:
    """The error for a refusal that is not a problem document, so that does not come from a stack."""
    detail = f"{server} answered {key} with status {status}, and not as a Llama Stack server does"
    return _BY_STATUS.get(status, UpstreamError)(detail, request_id=request_id)


def _request_id(problem: _Problem, fallback: str | None) -> str | None:
    return problem.instance.removeprefix(REQUEST_PREFIX) or fallback

"""The one body of all failures, and the pages that promise it."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from llama_stack import errors
from llama_stack.distribution import ServerLimits
from llama_stack.errors import (
    CheckpointError,
    ConflictError,
    FieldFault,
    InvalidRequestError,
    OverloadedError,
    RateLimitedError,
    SetupError,
    StackError,
    UnauthenticatedError,
)
from llama_stack.server.errors import MAX_FAULTS, of_status, problem, problem_bytes, problem_headers
from tests.server.serving import check_problem

DOCS = Path(__file__).resolve().parents[2] / "docs"


def shown_classes() -> list[type[StackError]]:
    """The classes whose own code a client can see."""
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, StackError)]
    return [error for error in found if not (issubclass(error, SetupError) and error.status >= 500)]


@pytest.mark.parametrize("error", shown_classes(), ids=lambda error: error.__name__)
def test_every_code_is_on_the_page_beside_its_status(error: type[StackError]) -> None:
    """A client's author looks a code up there."""
    rows = [
        line for line in (DOCS / "errors.md").read_text().splitlines() if f"`{error.code}`" in line and line[0] == "|"
    ]
    assert any(str(error.status) in row.split("|")[1] for row in rows)


def test_every_limit_is_on_the_page() -> None:
    """An operator looks a limit up there."""
    page = (DOCS / "operating.md").read_text()
    assert [name for name in ServerLimits.model_fields if f"`{name}`" not in page] == []


def test_example_on_the_page_is_what_is_sent() -> None:
    """Word for word, the id apart."""
    page = (DOCS / "errors.md").read_text()
    example = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    assert example is not None
    faults = [
        FieldFault("/max_tokens", "too_small", "should be greater than or equal to 0", 0),
        FieldFault("/max_tokns", "unknown_key", "is not a key here; did you mean 'max_tokens'?"),
    ]
    error = InvalidRequestError("2 fields are invalid", faults=faults)
    assert json.loads(example[1]) == problem(error, "9e18d9237f2721a15c90c547")


def test_only_so_many_faults_are_named() -> None:
    """A body with ten thousand faults must not have an answer larger than itself."""
    faults = [FieldFault(f"/{number}", "missing", "is required") for number in range(100)]
    document = problem(InvalidRequestError("100 fields are invalid", faults=faults), "r")
    assert len(document["errors"]) == MAX_FAULTS
    assert document["detail"] == "100 fields are invalid"


CANARIES = [ValueError("canary"), KeyError("canary"), SetupError("canary"), errors.StoreError("canary")]


@pytest.mark.parametrize("error", CANARIES)
def test_what_was_not_written_for_clients_is_not_shown_to_them(error: Exception) -> None:
    """A set-up error names paths, and a stranger's exception may hold anything."""
    document = problem(error, "r")
    check_problem(document, 500)
    assert "canary" not in str(document)


def test_refused_checkpoint_is_the_clients_own() -> None:
    """It named the checkpoint in its request, so it may read what is wrong with it."""
    assert problem(CheckpointError("no config.json in it"), "r")["status"] == 422


def test_headers_tell_what_to_do_next() -> None:
    """Retry-After in whole seconds, at least one; WWW-Authenticate where a key is wanted."""
    assert (b"retry-after", b"7") in problem_headers(OverloadedError("full", retry_after_seconds=7))
    assert (b"retry-after", b"1") in problem_headers(RateLimitedError("slow down", retry_after_seconds=0))
    assert (b"www-authenticate", b"Bearer") in problem_headers(UnauthenticatedError("who are you?"))


def test_member_that_is_not_json_is_told_in_words() -> None:
    """A plugin's own members may be of any type, and an answer that cannot be written would be no answer."""
    error = ConflictError("it is final", extra={"since": datetime(2026, 1, 2, tzinfo=UTC)})
    assert json.loads(problem_bytes(error, "r"))["since"] == "2026-01-02 00:00:00+00:00"


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "bad_request"), (409, "conflict"), (422, "validation"), (429, "rate_limited"), (507, "storage_full")],
)
def test_status_that_a_framework_chose_gets_the_code_of_the_page(status: int, code: str) -> None:
    """A program looks at the code, and the page says which codes a status has."""
    assert problem(of_status(status, "said so"), "r")["error"]["code"] == code


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 418, 451, 500, 501, 502, 503, 504])
def test_status_that_a_framework_chose_keeps_its_number(status: int) -> None:
    """A face may answer with any."""
    error = of_status(status, "said so")
    assert problem(error, "r")["status"] == status

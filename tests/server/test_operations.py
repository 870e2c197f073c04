"""Operations over HTTP: what a request must be, and the forms in which it is answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from llama_stack.apis import MemoryBanks, PostTraining
from llama_stack.distribution import Distribution
from llama_stack.errors import NotFoundError
from llama_stack.plugins import ProviderSpec, discover, hookimpl
from llama_stack.registry import Registry
from llama_stack.server import create_app
from llama_stack.stack import Stack, running
from llama_stack.testing import scripted
from tests.server.serving import CHAT, CHAT_PATH, Serving, problem_of, serving

pytestmark = pytest.mark.anyio


@pytest.fixture
async def served() -> AsyncIterator[Serving]:
    async with serving() as found:
        yield found


@asynccontextmanager
async def over_banks_and_jobs() -> AsyncIterator[tuple[httpx2.AsyncClient, Any]]:
    """A client of scripted memory banks and jobs, and the list of calls that they got."""
    banks: Any = scripted(MemoryBanks)()
    jobs: Any = scripted(PostTraining)()

    class Plugin:
        @hookimpl
        def llama_stack_providers(self) -> list[ProviderSpec]:
            @asynccontextmanager
            async def start_banks() -> AsyncIterator[MemoryBanks]:
                yield banks

            @asynccontextmanager
            async def start_jobs() -> AsyncIterator[PostTraining]:
                yield jobs

            return [
                ProviderSpec(api=MemoryBanks, name="scripted", start=start_banks),
                ProviderSpec(api=PostTraining, name="scripted", start=start_jobs),
            ]

    distribution = Distribution.model_validate(
        {
            "version": 1,
            "name": "scripted",
            "providers": {"memory_banks": [{"provider": "scripted"}], "post_training": [{"provider": "scripted"}]},
        }
    )
    stack = Stack(distribution, Registry(discover(extra=[Plugin()])))
    async with running(stack):
        transport = httpx2.ASGITransport(create_app(stack))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client, (banks.calls, jobs.calls)


async def test_whole_reply_is_one_json_value(served: Serving) -> None:
    """The plainest case, and every header that any reply has."""
    response = await served.client.post(CHAT_PATH, json=CHAT)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.json() == {"content": "Hello from the stub.", "stop_reason": "finished_ok", "tool_calls": []}


async def test_stream_is_events_that_end_with_a_stop_reason(served: Serving) -> None:
    """Spec rule G7: one chunk an event, the last one says why it stopped, and there is no [DONE]."""
    response = await served.client.post(CHAT_PATH, json={**CHAT, "stream": True})
    assert response.headers["content-type"] == "text/event-stream"
    assert response.text.endswith("\n\n")
    events = response.text.removesuffix("\n\n").split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["text_delta"] for chunk in chunks) == "Hello from the stub."
    assert [chunk["stop_reason"] for chunk in chunks] == ["not_stopped"] * 3 + ["finished_ok"]


@pytest.mark.parametrize("accept", ["application/jsonl", "application/x-ndjson", "application/jsonl, application/json"])
async def test_stream_is_lines_for_a_client_that_asks_for_lines(served: Serving, accept: str) -> None:
    """Spec rule G7: the official SDK of the time asked for application/jsonl."""
    response = await served.client.post(CHAT_PATH, json={**CHAT, "stream": True}, headers={"accept": accept})
    assert response.headers["content-type"] == "application/jsonl"
    assert [json.loads(line)["text_delta"] for line in response.text.splitlines()] == [
        "Hello", " from", " the", " stub.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("accept", "is_array"),
    [
        (None, False),
        ("*/*", False),
        ("application/json", True),
        ("application/json; charset=utf-8", True),
        ("application/json, application/jsonl", False),
        ("application/json, */*;q=0.1", False),
        ("application/json, application/jsonl;q=0", True),
        ("application/json, */*;q=0.0", True),
        ("application/jsonl", False),
        ("text/html", False),
    ],
)
async def test_lists_are_lines_unless_only_json_is_accepted(
    served: Serving, accept: str | None, is_array: bool
) -> None:
    """Spec rule G6."""
    body = {"model": "stub", "batch_dialogs": [CHAT["dialog"]] * 2}
    del served.client.headers["accept"]
    headers = {} if accept is None else {"accept": accept}
    response = await served.client.post("/inference/batch_chat_completion", json=body, headers=headers)
    found = response.json() if is_array else [json.loads(line) for line in response.text.splitlines()]
    assert response.headers["content-type"] == ("application/json" if is_array else "application/jsonl")
    assert [item["content"] for item in found] == ["Hello from the stub."] * 2


@pytest.mark.parametrize(("accept", "body"), [("application/jsonl", b""), ("application/json", b"[]")])
async def test_empty_list_is_an_empty_body_or_an_empty_array(served: Serving, accept: str, body: bytes) -> None:
    """Spec rule G6."""
    request = {"model": "stub", "batch_dialogs": []}
    response = await served.client.post("/inference/batch_chat_completion", json=request, headers={"accept": accept})
    assert (response.status_code, response.content) == (200, body)


async def test_void_reply_has_neither_body_nor_content_type() -> None:
    """Spec rule G8: FastAPI's default would send null as JSON, which the draft does not declare."""
    async with over_banks_and_jobs() as (client, (calls, _)):
        response = await client.post("/memory_banks/create?bank_uuid=b&bank_name=B", json=[])
        assert (response.status_code, response.content) == (200, b"")
        assert "content-type" not in response.headers
        assert calls == [("create", {"bank_uuid": "b", "bank_name": "B", "documents": []})]


@pytest.mark.parametrize("path", ["/inference/chat_completion", "/inference/chat_completion/"])
async def test_paths_work_with_and_without_the_slash(served: Serving, path: str) -> None:
    """Spec rule G16: a redirect would lose the body of a POST in many clients."""
    assert (await served.client.post(path, json=CHAT)).status_code == 200


async def test_the_drafts_own_trailing_slash_may_be_left_out() -> None:
    """Spec rule G16, from the other side: the draft's path ends in a slash; 422 shows that the operation was found."""
    async with over_banks_and_jobs() as (client, _):
        for path in ("/post_training/supervised_fine_tune", "/post_training/supervised_fine_tune/"):
            assert (await client.post(path, json={})).status_code == 422


async def test_operation_of_an_api_without_provider_is_501(served: Serving) -> None:
    """Spec rule G9: the draft has the operation, this distribution does not, and the reply says what to add."""
    response = await served.client.get("/memory_banks/get")
    document = problem_of(response)
    assert document["error"]["code"] == "not_implemented"
    assert "providers.memory_banks" in document["detail"]


@pytest.mark.parametrize(
    ("query", "pointer", "code"),
    [
        ("", "?bank_uuid", "missing"),
        ("bank_uid=b", "?bank_uid", "unknown_key"),
        ("bank_uuid=b&bank_uuid=c", "?bank_uuid", "repeated"),
        ("bank_uuid=", "?bank_uuid", "too_short"),
        ("bank_uuid=%00", "?bank_uuid", "bad_format"),
        ("bank_uuid=" + "b" * 256, "?bank_uuid", "too_long"),
    ],
)
async def test_query_parameters_are_as_strict_as_bodies(query: str, pointer: str, code: str) -> None:
    """Unknown, repeated and missing parameters are refused, each by name."""
    async with over_banks_and_jobs() as (client, (calls, _)):
        document = problem_of(await client.delete(f"/memory_banks/drop?{query}"))
        assert (document["status"], document["errors"][0]["pointer"]) == (422, pointer)
        assert document["errors"][0]["code"] == code
        assert not calls


@pytest.mark.parametrize("query", ["bank_uuid=%ff", "bank_uuid=%ed%a0%80", "&", "bank_uuid", "a=1&" * 100])
async def test_query_that_is_not_pairs_of_utf8_is_refused(query: str) -> None:
    """Half-decoded text would name a bank that nobody meant."""
    async with over_banks_and_jobs() as (client, _):
        assert problem_of(await client.delete(f"/memory_banks/drop?{query}"))["status"] == 422


async def test_misspelt_parameter_comes_with_the_right_one() -> None:
    """The nearest valid name saves a look into the documentation."""
    async with over_banks_and_jobs() as (client, _):
        document = problem_of(await client.delete("/memory_banks/drop?bank_uid=b"))
        assert "did you mean 'bank_uuid'" in document["errors"][0]["detail"]


async def test_query_on_an_operation_without_one_is_refused(served: Serving) -> None:
    """What is sent is never ignored."""
    assert problem_of(await served.client.get("/models/list?limit=1"))["errors"][0]["pointer"] == "?limit"
    assert problem_of(await served.client.post(f"{CHAT_PATH}?stream=true", json=CHAT))["status"] == 422


async def test_body_on_an_operation_without_one_is_refused(served: Serving) -> None:
    """What is sent is never ignored."""
    assert problem_of(await served.client.request("GET", "/models/list", json={}))["status"] == 422


@pytest.mark.parametrize("accept", ["text/event-stream", None])
async def test_follow_is_asked_for_by_parameter_or_by_accept(accept: str | None) -> None:
    """A browser's EventSource can set no parameter in a body, but says what it accepts."""
    async with over_banks_and_jobs() as (client, (_, calls)):
        url = "/post_training/job/logs?job_uuid=j" + ("" if accept else "&follow=true")
        response = await client.get(url, headers={"accept": accept} if accept else {})
        assert response.headers["content-type"] == "text/event-stream"
        assert calls == [("job_logs", {"job_uuid": "j", "follow": True})]


async def test_without_follow_the_log_is_a_snapshot() -> None:
    """The default form is the draft's: one JSON object."""
    async with over_banks_and_jobs() as (client, _):
        response = await client.get("/post_training/job/logs?job_uuid=j")
        assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("media", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ('Application/JSON;charset="UTF-8"', 200),
        ("application/json; charset=latin-1", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/jsonp", 415),
        ("", 415),
    ],
)
async def test_only_json_is_read(served: Serving, media: str, status: int) -> None:
    """A form or plain text can be posted by any page of another site without asking (CORS safelist)."""
    response = await served.client.post(CHAT_PATH, content=json.dumps(CHAT), headers={"content-type": media})
    assert response.status_code == status


async def test_compressed_bodies_are_refused(served: Serving) -> None:
    """A small body could unpack to one of any size."""
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = await served.client.post(CHAT_PATH, content=b"x", headers=headers)
    assert problem_of(response)["error"]["code"] == "unsupported_media"


async def test_faults_point_into_the_body(served: Serving) -> None:
    """Each with pointer, code, words and limit; of a union only the branch that was meant."""
    body = {
        "model": "stub",
        "dialog": {"message": {"role": "usr", "content": {"url": "http://x", "mimetype": "a"}}},
        "max_tokns": 3,
        "max_tokens": -1,
    }
    document = problem_of(await served.client.post(CHAT_PATH, json=body))
    assert document["detail"] == "5 fields are invalid"
    found = {fault["pointer"]: fault for fault in document["errors"]}
    assert found["/dialog/message/role"]["code"] == "not_in_enum"
    assert found["/dialog/message/content/mime_type"]["code"] == "missing"
    assert "did you mean 'mime_type'" in found["/dialog/message/content/mimetype"]["detail"]
    assert "did you mean 'max_tokens'" in found["/max_tokns"]["detail"]
    assert (found["/max_tokens"]["code"], found["/max_tokens"]["limit"]) == ("too_small", 0)


async def test_list_over_its_limit_is_told_both_counts(served: Serving) -> None:
    """In words for who sent it, to whom our order of checks means nothing."""
    body = {"model": "stub", "dialog": {"message": {"role": "user", "content": ["a"] * 10_001}}}
    document = problem_of(await served.client.post(CHAT_PATH, json=body))
    assert document["errors"] == [
        {
            "pointer": "/dialog/message/content",
            "code": "too_long",
            "detail": "should have at most 10000 items, not 10001",
            "limit": 10_000,
        }
    ]


async def test_wrong_branch_of_a_union_is_one_fault(served: Serving) -> None:
    """Three complaints about one number would hide what is wrong."""
    body = {"model": "stub", "dialog": {"message": {"role": "user", "content": 5}}}
    document = problem_of(await served.client.post(CHAT_PATH, json=body))
    assert document["errors"] == [
        {
            "pointer": "/dialog/message/content",
            "code": "wrong_type",
            "detail": "should be a list, a string or an object",
        }
    ]
    assert document["error"]["param"] == "dialog.message.content"


async def test_strict_requests_refuse_what_the_draft_requires() -> None:
    """Spec rule G1: with defaults filled in by us a client is never told that it is not draft-exact."""
    async with serving(server={"strict_requests": True}) as served:
        document = problem_of(await served.client.post(CHAT_PATH, json=CHAT))
        pointers = {fault["pointer"] for fault in document["errors"]}
        assert {"/stream", "/logprobs", "/max_tokens", "/dialog/message_history"} <= pointers
        message = {**CHAT["dialog"]["message"], "tool_calls": [], "tool_responses": []}
        sampling = {"temperature": 0.0, "strategy": "greedy", "top_p": 0.95, "top_k": 0}
        full = {
            "model": "stub",
            "dialog": {"message": message, "message_history": []},
            "sampling_params": sampling,
            "available_tools": [],
            "max_tokens": 0,
            "stream": False,
            "logprobs": False,
        }
        assert (await served.client.post(CHAT_PATH, json=full)).status_code == 200


async def test_errors_of_providers_keep_their_status(served: Serving) -> None:
    """A provider raises from errors.py and knows nothing of HTTP."""
    served.stub.failure = NotFoundError("there is no such thing", param="model")
    document = problem_of(await served.client.post(CHAT_PATH, json=CHAT))
    assert (document["status"], document["detail"]) == (404, "there is no such thing")
    assert document["error"]["param"] == "model"


@pytest.mark.parametrize("stream", [False, True])
async def test_strange_errors_are_500_without_their_text(
    served: Serving, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The text of an exception may hold a path, a query or a secret; the log has it under the request's id."""
    served.stub.failure = OSError("canary /etc/secret")
    response = await served.client.post(CHAT_PATH, json={**CHAT, "stream": stream})
    document = problem_of(response)
    assert (document["status"], document["error"]["code"]) == (500, "internal")
    assert "canary" not in response.text
    assert "OSError" not in response.text
    assert "canary" in caplog.text
    assert response.headers["x-request-id"] in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", [SystemExit(3), asyncio.CancelledError(), TimeoutError(), KeyError("canary")])
async def test_no_exception_of_a_provider_gets_past_the_server(
    served: Serving, failure: BaseException, stream: bool
) -> None:
    """Not even one that would end the process, or looks like a cancellation that nobody asked for."""
    served.stub.failure = failure
    assert problem_of(await served.client.post(CHAT_PATH, json={**CHAT, "stream": stream}))["status"] == 500
    served.stub.failure = None
    assert (await served.client.post(CHAT_PATH, json=CHAT)).status_code == 200


@pytest.mark.parametrize(
    ("offered", "is_echoed"), [("abc-1.2_3", True), ("x" * 64, True), ("x" * 65, False), ("a b", False)]
)
async def test_request_id_is_echoed_only_when_it_is_plain(served: Serving, offered: str, is_echoed: bool) -> None:
    """Anything else could forge a log line or a header."""
    response = await served.client.get("/health/live", headers={"x-request-id": offered})
    assert (response.headers["x-request-id"] == offered) is is_echoed
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    "path", ["/", "/nope", "/inference", "/inference/chat_completions", "/docs", "/openapi.json/x"]
)
async def test_unknown_route_is_a_problem(served: Serving, path: str) -> None:
    """The framework's own 404 has another shape."""
    assert problem_of(await served.client.get(path))["error"]["code"] == "route_not_found"


async def test_unknown_route_names_the_nearest(served: Serving) -> None:
    """Most unknown routes are misspelt ones."""
    detail = problem_of(await served.client.get("/inference/chat_completions"))["detail"]
    assert "did you mean '/inference/chat_completion'" in detail


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"])
async def test_wrong_method_names_the_right_one(served: Serving, method: str) -> None:
    """RFC 9110 section 15.5.6: a 405 has an Allow header."""
    response = await served.client.request(method, CHAT_PATH)
    assert problem_of(response)["error"]["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


async def test_head_is_get_without_the_body(served: Serving) -> None:
    """Probes use it."""
    response = await served.client.head("/health/live")
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "600001", "x", "9" * 30])
async def test_deadline_that_is_no_number_of_milliseconds_is_refused(served: Serving, value: str) -> None:
    """A deadline that is misread would be worse than none."""
    response = await served.client.post(CHAT_PATH, json=CHAT, headers={"x-deadline-ms": value})
    assert problem_of(response)["status"] == 422


async def test_provider_that_returns_the_wrong_thing_is_our_bug() -> None:
    """A reply that its contract does not allow is never sent."""

    class Wrong(scripted(MemoryBanks)):  # type: ignore[misc]  # a class made at run time
        async def drop(self, bank_uuid: str) -> Any:
            return 5

    class Plugin:
        @hookimpl
        def llama_stack_providers(self) -> list[ProviderSpec]:
            @asynccontextmanager
            async def start() -> AsyncIterator[MemoryBanks]:
                yield Wrong()

            return [ProviderSpec(api=MemoryBanks, name="wrong", start=start)]

    distribution = Distribution.model_validate(
        {"version": 1, "name": "wrong", "providers": {"memory_banks": [{"provider": "wrong"}]}}
    )
    stack = Stack(distribution, Registry(discover(extra=[Plugin()])))
    async with running(stack):
        transport = httpx2.ASGITransport(create_app(stack))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            assert problem_of(await client.delete("/memory_banks/drop?bank_uuid=b"))["status"] == 500

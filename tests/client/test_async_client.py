"""What a contract's method sends over HTTP, and what comes back as which type."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, assert_type

import pytest

from llama_stack.apis import APIS, Api, Inference, Safety, operations, post
from llama_stack.apis.common import Dialog, Message
from llama_stack.apis.inference import (
    BatchCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseStreamChunk,
)
from llama_stack.apis.memory_banks import MemoryBankDocument
from llama_stack.client import AsyncClient, Stream, Timeouts, chunks, whole
from llama_stack.distribution import Distribution
from llama_stack.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    NotProvidedError,
    OverloadedError,
    StackError,
    UnauthenticatedError,
    UnavailableError,
    UpstreamError,
)
from llama_stack.plugins import discover
from llama_stack.registry import Registry
from llama_stack.stack import Stack, running
from llama_stack.testing.stub_inference import StubPlugin
from tests.client.scripted_server import (
    Answer,
    Received,
    ScriptedServer,
    event,
    head,
    pieces,
    problem,
    then_silence,
)
from tests.client.scripted_server import whole as sent_whole

pytestmark = pytest.mark.anyio

CHUNK = {"text_delta": "a"}
LAST = {"text_delta": "", "stop_reason": "finished_ok"}
REPLY = {"content": "hi", "stop_reason": "finished_ok", "tool_calls": []}


class Weather(Api, name="weather"):
    """A third party's contract."""

    @post("/weather/in")
    async def weather(self, city: str, days: int = 1) -> str:
        raise NotImplementedError


def chat(*, stream: bool = False) -> ChatCompletionRequest:
    return ChatCompletionRequest(model="m", dialog=Dialog(message=Message.user("hello")), stream=stream)


async def streamed(client: AsyncClient) -> Stream[ChatCompletionResponseStreamChunk]:
    return chunks(await client.inference.chat_completion(chat(stream=True)))


@asynccontextmanager
async def served(answer: Answer, **options: Any) -> AsyncIterator[tuple[AsyncClient, ScriptedServer]]:
    async with ScriptedServer(answer) as server, AsyncClient(server.url + "/", **options) as client:
        yield client, server


def problem_answer(code: str, status: int, **members: Any) -> Answer:
    body = json.dumps(problem(code, status, **members)).encode()
    return sent_whole(body, "application/problem+json", status=status, x_request_id="h-1", retry_after="7")


# what is sent


async def test_a_body_goes_as_json_without_absent_fields() -> None:
    """The draft's schemas take no null: what is absent is left out, what has a default is sent (spec rule G1)."""
    async with served(sent_whole(json.dumps(REPLY).encode())) as (client, server):
        reply = whole(await client.inference.chat_completion(chat()))
    assert_type(client.inference, Inference)
    assert_type(client.api(Safety), Safety)
    assert_type(reply, ChatCompletionResponse)
    assert (reply.content, reply.tool_calls) == ("hi", [])
    [request] = server.requests
    assert (request.method, request.path) == ("POST", "/inference/chat_completion")
    assert request.headers["content-type"] == "application/json"
    assert request.headers["accept"] == "application/json"
    sent = json.loads(request.body)
    assert sent["max_tokens"] == 0
    assert "seed" not in sent["sampling_params"]
    assert ChatCompletionRequest.model_validate_json(request.body) == chat()


async def test_parameters_go_into_the_query_beside_a_body() -> None:
    """The draft's memory operations have both; base64 is the wire's, bytes are ours."""
    document = MemoryBankDocument(uuid="d", content=b"\x00\xff", metadata={}, mime_type="text/plain")
    async with served(sent_whole(b"", None)) as (client, server):
        await client.memory_banks.insert("b&1", [document])
    [request] = server.requests
    assert request.query == {"bank_uuid": "b&1"}
    assert json.loads(request.body)[0]["content"] == "AP8="


async def test_a_parameter_left_at_its_default_is_not_sent() -> None:
    """A server that knows only the draft would refuse the extension ``follow``."""
    logs = {"job_uuid": "j", "log_lines": ["x"]}
    async with served(sent_whole(json.dumps(logs).encode())) as (client, server):
        assert whole(await client.post_training.job_logs("j")).log_lines == ["x"]
    assert server.requests[0].query == {"job_uuid": "j"}


async def test_following_a_log_is_a_stream_of_events() -> None:
    """Operation 21: the same path answers with a snapshot or, when asked, with what comes."""
    logs = {"job_uuid": "j", "log_lines": ["x"]}
    async with served(pieces(event(logs), event(logs))) as (client, server):
        found = [part.log_lines async for part in chunks(await client.post_training.job_logs("j", follow=True))]
    assert found == [["x"], ["x"]]
    assert server.requests[0].query == {"job_uuid": "j", "follow": "true"}
    assert server.requests[0].headers["accept"] == "text/event-stream"


async def test_arguments_that_the_contract_refuses_are_not_sent() -> None:
    """The caller gets the same error as from the server, with every fault, and the server gets nothing."""
    async with served(sent_whole(b"", None)) as (client, server):
        with pytest.raises(InvalidRequestError) as caught:
            await client.memory_banks.create("", "n\x00", [])
    assert [fault.pointer for fault in caught.value.faults] == ["?bank_uuid", "?bank_name"]
    assert server.requests == []


async def test_connections_are_used_again() -> None:
    """A connection a request would cost more than the request."""
    async with served(sent_whole(json.dumps(REPLY).encode())) as (client, server):
        for _ in range(3):
            await client.inference.chat_completion(chat())
    assert (len(server.requests), server.connections) == (3, 1)


async def test_a_proxy_in_the_environment_is_ignored_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection that nobody named (DESIGN, decision 11)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = listener.getsockname()[1]
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{dead}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    async with ScriptedServer(sent_whole(json.dumps(REPLY).encode())) as server:
        async with AsyncClient(server.url) as client:
            await client.inference.chat_completion(chat())
        async with AsyncClient(server.url, trust_env=True) as client:
            with pytest.raises(UpstreamError, match="cannot connect"):
                await client.inference.chat_completion(chat())
    assert len(server.requests) == 1


async def test_a_key_goes_into_the_authorization_header() -> None:
    """Bearer, as the error contract's 401 asks for."""
    async with served(sent_whole(json.dumps(REPLY).encode()), api_key="k") as (client, server):
        await client.inference.chat_completion(chat())
    assert server.requests[0].headers["authorization"] == "Bearer k"


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8321", "ftp://x", "http://", "http://u:secret@x", "http://x/?a=1", "", " http://x"),
        *("http://[::1", "http://x:secret", "http://x:99999", "http://x:0", "http://x\n/y", "http://\u2100"),
    ],
)
async def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    """And without repeating a password that somebody wrote into it."""
    with pytest.raises(ValueError, match="the address of a server") as caught:
        AsyncClient(url)
    assert "secret" not in str(caught.value)


# lists


async def test_lines_are_items_as_they_arrive() -> None:
    """The first item is here while the server still works on the second."""
    lines = [json.dumps({"uuid": "b", "name": "Ä"}).encode() + b"\n"]
    async with served(then_silence(lines[0], media_type="application/jsonl")) as (client, server):
        banks = await client.memory_banks.list_banks()
        assert (await anext(banks)).name == "Ä"
    assert server.requests[0].headers["accept"] == "application/jsonl"


async def test_lines_may_be_strings_and_none_at_all() -> None:
    """Operation 17 answers with quoted JSON strings; an empty list is an empty body (spec rule G6)."""
    async with served(pieces(b'"a"\n"b', b'"\n', media_type="application/jsonl")) as (client, _):
        assert [u async for u in await client.memory_banks.delete_documents("b", ["a", "b"])] == ["a", "b"]
    async with served(sent_whole(b"", "application/jsonl")) as (client, _):
        assert [u async for u in await client.memory_banks.delete_documents("b", [])] == []


async def test_a_batch_that_breaks_off_is_an_error() -> None:
    """Operation 9: a late failure aborts the connection, for a list has no place for an error."""
    line = json.dumps({"content": "x"}).encode() + b"\n"
    async with served(pieces(line, media_type="application/jsonl", ends=False)) as (client, _):
        request = BatchCompletionRequest(model="m", content_batch=["a", "b"])
        items = await client.inference.batch_completion(request)
        assert (await anext(items)).content == "x"
        with pytest.raises(UpstreamError, match="broke during POST /inference/batch_completion"):
            await anext(items)


async def test_a_problem_as_the_last_line_is_that_error() -> None:
    """The error contract: after the first byte, JSON lines end with one error object."""
    body = json.dumps({"uuid": "b", "name": "n"}).encode() + b"\n" + json.dumps(problem("overloaded", 503)).encode()
    async with served(pieces(body, media_type="application/jsonl")) as (client, _):
        banks = await client.memory_banks.list_banks()
        await anext(banks)
        with pytest.raises(OverloadedError) as caught:
            await anext(banks)
    assert caught.value.request_id == "r-1"


# streams


async def test_a_stream_gives_its_chunks() -> None:
    """In order, as the contract's type, and then it ends."""
    async with served(pieces(event(CHUNK), event(CHUNK), event(LAST))) as (client, server):
        stream = await streamed(client)
        assert_type(stream, Stream[ChatCompletionResponseStreamChunk])
        found = [chunk.text_delta async for chunk in stream]
    assert found == ["a", "a", ""]
    assert server.requests[0].headers["accept"] == "text/event-stream"


async def test_an_error_event_is_raised_as_what_the_provider_raised() -> None:
    """The status was spent with the first byte; the event carries the rest (RELIABILITY, section 4)."""
    late = event(problem("engine_restarted", 503, "again"), "error")
    async with served(pieces(event(CHUNK), late)) as (client, _):
        stream = await streamed(client)
        await anext(stream)
        with pytest.raises(StackError, match="again") as caught:
            await anext(stream)
    assert (caught.value.code, caught.value.status, caught.value.retriable) == ("engine_restarted", 503, True)


@pytest.mark.parametrize(
    ("parts", "ends", "message"),
    [
        ([event(CHUNK)], True, "without the last chunk"),
        ([], True, "without the last chunk"),
        ([event(CHUNK)], False, "broke during"),
        ([event(CHUNK), event({"text_delta": 1})], True, "/text_delta"),
        ([event(CHUNK), event({"nonsense": 1}, "error")], True, "broke off its answer"),
        ([event(CHUNK), b"data: {\n\n"], True, "does not allow"),
    ],
)
async def test_a_stream_that_does_not_reach_its_end_is_an_error(parts: list[bytes], ends: bool, message: str) -> None:
    """Half an answer must never look like a whole one."""
    async with served(pieces(*parts, ends=ends)) as (client, _):
        stream = await streamed(client)
        with pytest.raises(UpstreamError, match=message):
            async for _ in stream:
                pass


async def test_closing_a_stream_closes_its_connection() -> None:
    """That is how the server learns that nobody reads on, and stops the work."""
    async with served(then_silence(event(CHUNK))) as (client, server):
        async with await streamed(client) as stream:
            await anext(stream)
        await asyncio.wait_for(server.hung_up.wait(), 5)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


@pytest.mark.parametrize("is_begun", [True, False])
async def test_dropping_a_stream_closes_its_connection(is_begun: bool) -> None:
    """A caller that leaves its loop by ``break`` closes nothing itself."""
    async with served(then_silence(event(CHUNK))) as (client, server):
        stream = await streamed(client)
        if is_begun:
            await anext(stream)
        del stream
        gc.collect()
        await asyncio.wait_for(server.hung_up.wait(), 5)


async def test_cancelling_a_plain_call_closes_its_connection() -> None:
    """Also work that is not streamed stops when its caller leaves."""

    async def never(request: Received, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with served(never) as (client, server):
        call = asyncio.create_task(client.inference.chat_completion(chat()))
        while not server.requests:
            await asyncio.sleep(0.001)
        call.cancel()
        await asyncio.wait_for(server.hung_up.wait(), 5)
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_closing_the_client_ends_its_streams_with_an_error() -> None:
    """A stream that was cut must not look like one that came to its end."""
    async with served(then_silence(event(CHUNK))) as (client, server):
        stream = await streamed(client)
        await anext(stream)
        step = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        await client.aclose()
        with pytest.raises(UpstreamError):
            await step
        await asyncio.wait_for(server.hung_up.wait(), 5)


async def test_whole_and_chunks_say_when_the_reply_is_the_other_kind() -> None:
    """A request that asked for the wrong one is a mistake of the program, found where it is made."""
    async with served(sent_whole(json.dumps(REPLY).encode())) as (client, _):
        with pytest.raises(TypeError, match="stream=True"):
            chunks(await client.inference.chat_completion(chat()))
    async with served(pieces(event(LAST))) as (client, _):
        with pytest.raises(TypeError, match="stream=False"):
            whole(await client.inference.chat_completion(chat(stream=True)))


# refusals


def _codes() -> list[tuple[str, type[StackError]]]:
    found, pending = [], [StackError]
    while pending:
        error = pending.pop()
        pending += error.__subclasses__()
        if error.__module__ == "llama_stack.errors" and "code" in vars(error):
            found.append((error.code, error))
    return sorted(found, key=lambda pair: pair[0])


@pytest.mark.parametrize(("code", "kind"), _codes())
async def test_every_error_comes_back_as_its_own_class(code: str, kind: type[StackError]) -> None:
    """A client catches what the provider raised; only a missing route becomes 501: it was made from the contract."""
    answer = problem_answer(code, kind.status, detail="the detail", param="model", existing_matches=False)
    async with served(answer) as (client, _):
        with pytest.raises(StackError) as caught:
            await client.inference.chat_completion(chat())
    error = caught.value
    if code in ("route_not_found", "method_not_allowed"):
        assert type(error) is NotProvidedError
        return
    assert (type(error), error.status, error.detail) == (kind, kind.status, "the detail")
    assert (error.param, error.extra, error.request_id) == ("model", {"existing_matches": False}, "r-1")
    assert error.retry_after_seconds == 7


async def test_the_faults_of_a_request_come_back_one_by_one() -> None:
    """Each names its place, as the server named it."""
    errors = [{"pointer": "/max_tokens", "code": "too_large", "detail": "too large", "limit": 8192}]
    async with served(problem_answer("validation", 422, errors=errors)) as (client, _):
        with pytest.raises(InvalidRequestError) as caught:
            await client.inference.chat_completion(chat())
    [fault] = caught.value.faults
    assert (fault.pointer, fault.code, fault.limit) == ("/max_tokens", "too_large", 8192)


async def test_a_code_that_we_do_not_know_keeps_its_status() -> None:
    """A newer server, or a plugin's own error: nothing of it is lost."""
    async with served(problem_answer("brand_new", 418, detail="tea")) as (client, _):
        with pytest.raises(StackError) as caught:
            await client.inference.chat_completion(chat())
    assert (caught.value.code, caught.value.status, caught.value.detail) == ("brand_new", 418, "tea")


@pytest.mark.parametrize(("streams", "shape"), [(False, "whole"), (True, "stream")])
async def test_a_refusal_is_raised_by_the_call_itself(streams: bool, shape: str) -> None:
    """Streamed or whole: an error before the first byte is met before the first item."""
    async with served(problem_answer("model_not_found", 404)) as (client, _):
        with pytest.raises(ModelNotFoundError):
            await client.inference.chat_completion(chat(stream=streams))
        with pytest.raises(ModelNotFoundError):
            await client.memory_banks.list_banks()


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (sent_whole(b"<html>", "text/html", status=502), UpstreamError, "status 502"),
        (sent_whole(b"<html>", "text/html", status=401), UnauthenticatedError, "status 401"),
        (sent_whole(b"", None, status=503), OverloadedError, "status 503"),
        (sent_whole(b"", None, status=307, location="https://x/"), UpstreamError, "redirects .* to https://x/"),
        (sent_whole(b"{}", "text/html"), UpstreamError, "text/html in place of application/json"),
        (sent_whole(b"{}"), UpstreamError, "does not allow"),
        (sent_whole(b"{"), UpstreamError, "does not allow"),
        (sent_whole(b"{}", content_encoding="gzip"), UpstreamError, "encoding 'gzip'"),
        (sent_whole(b" " * 2000), UpstreamError, "more than 1000 bytes"),
    ],
)
async def test_an_answer_that_no_stack_would_give_is_an_upstream_error(
    answer: Answer, kind: type[StackError], message: str
) -> None:
    """A proxy, another service, a captive portal: said as it is, and bounded."""
    async with served(answer, max_reply_bytes=1000) as (client, _):
        with pytest.raises(kind, match=message):
            await client.inference.chat_completion(chat())


async def test_a_server_that_is_not_there_is_named() -> None:
    """The address is what the user must correct."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with AsyncClient(url) as client:
        with pytest.raises(UpstreamError, match=f"cannot connect to {url}"):
            await client.inference.chat_completion(chat())


async def test_a_host_that_no_name_can_be_made_of_is_named() -> None:
    """Only the HTTP library knows the rules of international names; its refusal is an error like any other."""
    async with AsyncClient("http://\u2603.example") as client:
        with pytest.raises(UpstreamError, match="cannot connect to http://\u2603.example: Invalid IDNA hostname"):
            await client.inference.chat_completion(chat())


# time


async def test_the_wait_between_two_bytes_is_bounded() -> None:
    """A server that hangs in the middle of a stream is left, not waited for."""
    async with ScriptedServer(then_silence(event(CHUNK))) as server:
        async with AsyncClient(server.url, timeouts=Timeouts(read_seconds=0.05)) as client:
            stream = await streamed(client)
            await anext(stream)
            with pytest.raises(DeadlineExceededError, match=r"sent nothing for 0\.05 s"):
                await anext(stream)
        await asyncio.wait_for(server.hung_up.wait(), 5)


@pytest.mark.parametrize("streams", [False, True])
async def test_the_wait_for_an_answer_can_be_bounded(streams: bool) -> None:
    """The server is told of the bound, so that it stops working when nobody waits any more."""

    async def drips(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head("application/json")[:-4])
        while True:
            writer.write(b"\r\nx: y")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with ScriptedServer(drips) as server:
        async with AsyncClient(server.url, timeouts=Timeouts(answer_seconds=0.1)) as client:
            with pytest.raises(DeadlineExceededError, match="did not answer POST /inference/chat_completion"):
                await client.inference.chat_completion(chat(stream=streams))
        await asyncio.wait_for(server.hung_up.wait(), 5)
    assert server.requests[0].headers["x-deadline-ms"] == "100"


# contracts


@pytest.mark.parametrize("contract", APIS, ids=lambda contract: contract.name)
async def test_every_contract_has_its_implementation(contract: type[Api]) -> None:
    """Nothing of an operation is written twice: the client of a contract is read off it."""
    async with AsyncClient("http://127.0.0.1:1") as client:
        implementation = client.api(contract)
        assert isinstance(implementation, contract)
        for operation in operations(contract):
            method = getattr(implementation, operation.name)
            assert method.__func__ is not getattr(contract, operation.name)


async def test_a_third_party_contract_works_as_ours_do() -> None:
    """No list of APIs stands anywhere in the client."""

    async with served(sent_whole(b'"rain"')) as (client, server):
        assert await client.api(Weather).weather("Bern", days=2) == "rain"
    assert server.requests[0].query == {"city": "Bern", "days": "2"}


async def test_models_come_from_the_catalogue() -> None:
    """``models`` is no operation, but the catalogue answers it, each API for its own kinds."""
    models = [{"model": "a", "kind": "llm", "metadata": {}}, {"model": "r", "kind": "reward", "metadata": {}}]
    body = "".join(json.dumps(model) + "\n" for model in models).encode()
    async with served(sent_whole(body, "application/jsonl")) as (client, server):
        assert [model.model for model in await client.inference.models()] == ["a"]
        assert [model.model for model in await client.reward_scoring.models()] == ["r"]
        assert await client.inference.owns("a")
        assert not await client.inference.owns("r")
    assert {request.path for request in server.requests} == {"/models/list"}


async def test_what_no_request_could_answer_is_said_to_be_so() -> None:
    """Never an empty list in place of an answer."""
    async with AsyncClient("http://127.0.0.1:1") as client:
        with pytest.raises(NotProvidedError, match=r"Safety\.shields cannot be asked over HTTP"):
            await client.safety.shields()
        with pytest.raises(NotProvidedError):
            await client.safety.owns("llama_guard")


async def test_what_a_server_holds_can_be_asked() -> None:
    """``owns`` is no operation either; it lets a remote provider stand beside another one of its API."""
    banks = json.dumps({"uuid": "b", "name": "n"}).encode()
    async with served(sent_whole(banks, "application/jsonl")) as (client, _):
        assert [await client.memory_banks.owns(bank) for bank in ("b", "c")] == [True, False]
    dataset = json.dumps({"columns": {}, "content_url": "http://x/", "metadata": {}}).encode()
    async with served(sent_whole(dataset)) as (client, _):
        assert await client.datasets.owns("d")
    async with served(problem_answer("not_found", 404)) as (client, _):
        assert not await client.datasets.owns("d")
        assert not await client.post_training.owns("j")


# in this process


async def test_a_client_over_a_stack_hands_out_the_stacks_own_objects() -> None:
    """No HTTP, no copy, no second meaning; the client neither starts nor stops the stack."""
    plugin = StubPlugin()
    distribution = Distribution.model_validate(
        {"version": 1, "name": "here", "providers": {"inference": [{"provider": "stub"}]}}
    )
    stack = Stack(distribution, Registry(discover([plugin])))
    async with AsyncClient.over(stack) as client:
        assert client.inference is stack.api(Inference)
        with pytest.raises(UnavailableError):
            await client.inference.models()
        async with running(stack):
            request = ChatCompletionRequest(model="stub", dialog=chat().dialog, stream=True)
            async with chunks(await client.inference.chat_completion(request)) as stream:
                assert (await anext(stream)).text_delta == "Hello"
            assert plugin.started[0].stopped == 1
            with pytest.raises(ModelNotFoundError):
                await client.inference.chat_completion(chat())

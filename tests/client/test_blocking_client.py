"""The client for code that is not async: the same contracts, waiting, from any thread."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, assert_type

import pytest

from llama_stack.apis import APIS, Api, operations, post
from llama_stack.apis.common import Dialog, Message, Schema
from llama_stack.apis.inference import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseStreamChunk,
)
from llama_stack.client import BlockingApi, BlockingStream, Client, blocking, chunks, whole
from llama_stack.client.event_loop import EventLoopThread
from llama_stack.distribution import Distribution
from llama_stack.errors import ModelNotFoundError, ProviderStartError, UpstreamError
from llama_stack.plugins import ApiSpec, ProviderSpec, discover, hookimpl
from llama_stack.registry import Registry
from llama_stack.stack import Stack
from tests.client.scripted_server import Answer, Received, ScriptedServer, event, pieces, problem, then_silence
from tests.client.scripted_server import whole as sent_whole

CHUNK = {"text_delta": "a"}
LAST = {"text_delta": "", "stop_reason": "finished_ok"}
REPLY = json.dumps({"content": "hi", "stop_reason": "finished_ok", "tool_calls": []}).encode()


def chat(*, stream: bool = False) -> ChatCompletionRequest:
    return ChatCompletionRequest(model="m", dialog=Dialog(message=Message.user("hello")), stream=stream)


@contextmanager
def served(answer: Answer) -> Iterator[tuple[Client, ScriptedServer, Callable[[], None]]]:
    """A client and its server; the function waits until the client has hung up."""
    thread = EventLoopThread()
    server = thread.run(_entered(ScriptedServer(answer)))
    try:
        with Client(server.url) as client:
            yield client, server, lambda: thread.run(asyncio.wait_for(_set(server.hung_up), 5))
    finally:
        thread.run(server.__aexit__(None, None, None))
        thread.close()


async def _entered(server: ScriptedServer) -> ScriptedServer:
    return await server.__aenter__()


async def _set(happened: asyncio.Event) -> None:
    await happened.wait()


def test_a_plain_call_waits_for_its_reply() -> None:
    """The same request and reply types as the async client's, with no await."""
    with served(sent_whole(REPLY)) as (client, _, _):
        reply = whole(client.inference.chat_completion(chat()))
    assert_type(reply, ChatCompletionResponse)
    assert reply.content == "hi"


def test_a_stream_is_a_plain_iterator() -> None:
    """``for chunk in ...`` is what users write."""
    with served(pieces(event(CHUNK), event(LAST))) as (client, _, _):
        stream = chunks(client.inference.chat_completion(chat(stream=True)))
        assert_type(stream, BlockingStream[ChatCompletionResponseStreamChunk])
        assert [chunk.text_delta for chunk in stream] == ["a", ""]
        assert list(stream) == []


def test_an_item_is_handed_over_when_it_arrives() -> None:
    """Nothing waits for the end of the stream."""
    with served(then_silence(event(CHUNK))) as (client, _, hung_up):
        with chunks(client.inference.chat_completion(chat(stream=True))) as stream:
            assert next(stream).text_delta == "a"
        hung_up()
        assert list(stream) == []


@pytest.mark.parametrize("is_begun", [True, False])
def test_dropping_a_stream_stops_it(is_begun: bool) -> None:
    """A loop that is left by ``break`` closes nothing itself."""
    with served(then_silence(event(CHUNK))) as (client, _, hung_up):
        stream = chunks(client.inference.chat_completion(chat(stream=True)))
        if is_begun:
            next(stream)
        del stream
        gc.collect()
        hung_up()


def test_errors_are_raised_where_they_are_met() -> None:
    """By the call itself, or by the step of the loop."""
    refusal = sent_whole(json.dumps(problem("model_not_found", 404)).encode(), status=404)
    with served(refusal) as (client, _, _), pytest.raises(ModelNotFoundError):
        client.inference.chat_completion(chat())
    with served(pieces(event(CHUNK))) as (client, _, _):
        stream = chunks(client.inference.chat_completion(chat(stream=True)))
        next(stream)
        with pytest.raises(UpstreamError):
            next(stream)
        assert list(stream) == []


def test_ctrl_c_stops_the_stream_behind_it() -> None:
    """The user's interrupt must reach the server, or it generates on."""
    with served(then_silence(event(CHUNK))) as (client, _, hung_up):
        stream = chunks(client.inference.chat_completion(chat(stream=True)))
        next(stream)
        main = threading.main_thread().ident
        assert main is not None
        timer = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        timer.join()
        hung_up()


def test_threads_share_a_client() -> None:
    """A web application has one client and many threads."""
    with served(sent_whole(REPLY)) as (client, server, _):
        found: list[object] = []

        def ask() -> None:
            for _ in range(5):
                found.append(whole(client.inference.chat_completion(chat())).content)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == ["hi"] * 20
    assert len(server.requests) == 20


def test_a_closed_client_says_so() -> None:
    """And may be closed twice; its open streams have ended."""
    with served(then_silence(event(CHUNK))) as (client, _, hung_up):
        stream = chunks(client.inference.chat_completion(chat(stream=True)))
        client.close()
        client.close()
        hung_up()
        stream.close()
        assert list(stream) == []
        with pytest.raises(RuntimeError, match="the client is closed"):
            client.inference.chat_completion(chat())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_closed_by_another_thread_ends_the_calls_of_this_one(stream: bool) -> None:
    """With an error that says so: neither a wait for ever nor a stream that looks complete."""
    arrived = threading.Event()
    silence = then_silence(event(CHUNK)) if stream else then_silence(b"{", media_type="application/json")

    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await silence(request, writer)

    with served(answer) as (client, _, hung_up):
        raised: list[BaseException] = []

        def ask() -> None:
            try:
                reply = client.inference.chat_completion(chat(stream=stream))
                if stream:
                    list(chunks(reply))
            except Exception as error:
                raised.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        assert arrived.wait(10)
        client.close()
        asking.join(10)
        assert not asking.is_alive()
        hung_up()
    [error] = raised
    assert isinstance(error, RuntimeError | UpstreamError)  # which of the two, the moment decides


# forms of contracts


@pytest.mark.parametrize("contract", APIS, ids=lambda contract: contract.name)
def test_every_contract_has_a_blocking_form_with_its_signatures(contract: type[Api]) -> None:
    """Taken from the contract method by method, so that a parameter added there is there here too."""
    forms = {form.contract: form for form in BlockingApi.__subclasses__()}
    form = forms[contract]
    for operation in operations(contract):
        method = getattr(form, operation.name)
        assert inspect.signature(method) == inspect.signature(getattr(contract, operation.name))
        assert inspect.getdoc(method) == operation.doc
    with Client("http://127.0.0.1:1") as client:
        assert isinstance(getattr(client, contract.name), form)


class Count(Schema):
    """A number."""

    number: int


class Counting(Api, name="counting"):
    """A third party's contract."""

    @post("/counting/up")
    async def up(self, limit: str) -> AsyncIterator[Count]:
        raise NotImplementedError


class BlockingCounting(BlockingApi, of=Counting):
    up = blocking(Counting.up)


def test_a_form_that_lacks_an_operation_is_refused() -> None:
    """An operation added to a contract is missed when the program starts, not when it is called."""
    with pytest.raises(TypeError, match="Lacking lacks operations of Counting: up"):

        class Lacking(BlockingApi, of=Counting):
            pass


# in this process


class Counter(Counting):
    """Counts, and writes down which task ran it from its first step to its end."""

    def __init__(self, seen: list[Any]) -> None:
        self._seen = seen

    async def up(self, limit: str) -> AsyncIterator[Count]:
        return self._count(int(limit))

    async def _count(self, limit: int) -> AsyncIterator[Count]:
        try:
            async with asyncio.timeout(60):  # fails when it is entered in one task and left in another
                for number in range(limit):
                    yield Count(number=number)
        finally:
            self._seen.append("closed")


def counting_stack(seen: list[Any], *, fails: bool = False) -> Stack:
    @asynccontextmanager
    async def start() -> AsyncIterator[Counting]:
        if fails:
            raise OSError("no numbers left")
        seen.append("up")
        yield Counter(seen)
        seen.append("down")

    class Plugin:
        @hookimpl
        def llama_stack_apis(self) -> list[ApiSpec]:
            return [ApiSpec(api=Counting)]

        @hookimpl
        def llama_stack_providers(self) -> list[ProviderSpec]:
            return [ProviderSpec(api=Counting, name="counter", start=start)]

    distribution = Distribution.model_validate(
        {"version": 1, "name": "t", "providers": {"counting": [{"provider": "counter"}]}}
    )
    return Stack(distribution, Registry(discover([Plugin()])))


def test_a_client_over_a_stack_starts_and_stops_it() -> None:
    """A script needs no server: the stack runs in the client's own thread."""
    seen: list[Any] = []
    with Client.over(counting_stack(seen)) as client:
        counts = client.api(BlockingCounting).up("3")
        assert_type(counts, Iterator[Count])
        assert [count.number for count in counts] == [0, 1, 2]
        with client.api(BlockingCounting).up("3") as stream:  # type: ignore[attr-defined]  # an Iterator to mypy
            next(stream)
    assert seen == ["up", "closed", "closed", "down"]


def test_a_stack_that_does_not_start_leaves_no_thread_behind() -> None:
    """The error is the stack's own, and the program can go on."""
    before = threading.active_count()
    with pytest.raises(ProviderStartError, match="no numbers left"):
        Client.over(counting_stack([], fails=True))
    assert threading.active_count() == before

"""One stack behind another: the near one holds nothing but the address of the far one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from llama_stack_remote import RemoteConfig, plugin
from pydantic import ValidationError

from llama_stack.apis import APIS, Api, Inference, operations, post
from llama_stack.apis.common import Dialog, Message
from llama_stack.apis.inference import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingsRequest,
)
from llama_stack.client import AsyncClient, chunks, whole
from llama_stack.distribution import Distribution
from llama_stack.errors import (
    ContextLengthError,
    DeadlineExceededError,
    EngineRestartedError,
    InvalidRequestError,
    ModelNotFoundError,
    NotProvidedError,
    OverloadedError,
    ProviderStartError,
    ProviderUnavailableError,
    StackError,
    StorageFullError,
    UpstreamError,
)
from llama_stack.plugins import ApiSpec, ProviderSpec, discover, hookimpl
from llama_stack.registry import Registry, declaration_problems
from llama_stack.server import listening
from llama_stack.stack import Stack, State, running
from llama_stack.testing.stub_inference import StubInference, StubPlugin
from tests.broken_plugins import install
from tests.client.scripted_server import ScriptedServer
from tests.client.scripted_server import whole as sent_whole

pytestmark = pytest.mark.anyio


def distribution(providers: dict[str, Any], port: int = 0) -> Distribution:
    server = {"port": port, "drain_seconds": 1}
    return Distribution.model_validate({"version": 1, "name": "t", "providers": providers, "server": server})


def far_stack(stub: StubPlugin) -> Stack:
    return Stack(distribution({"inference": [{"provider": "stub"}]}), Registry(discover([stub])))


def near_stack(url: str, *more: object, api: str = "inference", **entry: Any) -> Stack:
    config = {"url": url, **entry.pop("config", {})}
    entries = {api: [{"provider": "remote", "config": config, **entry}]}
    return Stack(distribution(entries), Registry(discover(more)))


@asynccontextmanager
async def served(stack: Stack) -> AsyncIterator[str]:
    """The address of a server of this stack."""
    async with running(stack), listening(stack) as listener:
        yield listener.url


@dataclass
class Chain:
    """Client, near server, far server, model."""

    client: AsyncClient
    direct: AsyncClient
    """A client of the far server, for comparison."""
    url: str
    stub: StubInference


@asynccontextmanager
async def chain() -> AsyncIterator[Chain]:
    stub = StubPlugin()
    async with AsyncExitStack() as stack:
        far = await stack.enter_async_context(served(far_stack(stub)))
        near = await stack.enter_async_context(served(near_stack(far)))
        client = await stack.enter_async_context(AsyncClient(near))
        direct = await stack.enter_async_context(AsyncClient(far))
        yield Chain(client, direct, near, stub.started[0])


def chat(*, stream: bool = False, model: str = "stub") -> ChatCompletionRequest:
    return ChatCompletionRequest(model=model, dialog=Dialog(message=Message.user("hello")), stream=stream)


async def everything(client: AsyncClient) -> list[Any]:
    """What a client gets of every operation of inference."""
    completion = CompletionRequest(model="stub", content="a")
    streamed = CompletionRequest(model="stub", content="a", stream=True)
    batch = BatchChatCompletionRequest(model="stub", batch_dialogs=[chat().dialog] * 3)
    return [
        whole(await client.inference.completion(completion)),
        whole(await client.inference.chat_completion(chat())),
        [chunk async for chunk in chunks(await client.inference.completion(streamed))],
        [chunk async for chunk in chunks(await client.inference.chat_completion(chat(stream=True)))],
        [answer async for answer in await client.inference.batch_chat_completion(batch)],
        await client.inference.embeddings(EmbeddingsRequest(model="stub", contents=["a", "bc"])),
        sorted(model.model for model in await client.inference.models()),
    ]


async def test_a_hop_changes_nothing() -> None:
    """Whole, streamed, in lines: the near stack answers as the far one does."""
    async with chain() as made:
        assert await everything(made.client) == await everything(made.direct)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    "failure",
    [
        ContextLengthError(9, 8),
        ModelNotFoundError("stub", ["other"]),
        OverloadedError("the queue is full", retry_after_seconds=3),
        EngineRestartedError("again"),
        StorageFullError("no room"),
        NotProvidedError("not this one"),
        DeadlineExceededError("too late"),
        type("HouseError", (StackError,), {"status": 418, "code": "house_rule", "title": "House"})("tea only"),
    ],
    ids=lambda failure: failure.code,
)
async def test_an_error_keeps_its_class_status_code_and_words(failure: StackError, streams: bool) -> None:
    """A client behind two servers must be able to act as one behind one."""
    async with chain() as made:
        made.stub.failure = failure
        with pytest.raises(StackError) as near:
            await made.client.inference.chat_completion(chat(stream=streams))
        with pytest.raises(StackError) as far:
            await made.direct.inference.chat_completion(chat(stream=streams))
    assert near.value.code == far.value.code == failure.code
    assert near.value.status == far.value.status == failure.status
    assert near.value.detail == far.value.detail == failure.detail
    assert near.value.extra == far.value.extra == failure.extra
    assert near.value.retry_after_seconds == far.value.retry_after_seconds == failure.retry_after_seconds


async def test_an_error_after_the_first_chunk_is_still_that_error() -> None:
    """The status is spent, the event carries the rest, twice."""
    async with chain() as made:
        made.stub.failure, made.stub.fail_at = EngineRestartedError("again"), 2
        stream = chunks(await made.client.inference.chat_completion(chat(stream=True)))
        assert [(await anext(stream)).text_delta, (await anext(stream)).text_delta] == ["Hello", " from"]
        with pytest.raises(EngineRestartedError, match="again"):
            await anext(stream)


async def test_a_bug_on_the_far_side_shows_nothing_of_itself() -> None:
    """Generic words and the status 500, as on the far side itself."""
    async with chain() as made:
        made.stub.failure = RuntimeError("secret path")
        with pytest.raises(StackError) as caught:
            await made.client.inference.chat_completion(chat())
    assert (caught.value.status, caught.value.code) == (500, "internal")
    assert "secret" not in caught.value.detail


@pytest.mark.parametrize("streams", [False, True])
async def test_a_client_that_leaves_stops_the_work_on_the_far_side(streams: bool) -> None:
    """Two hops away a model would otherwise go on generating for nobody."""
    async with chain() as made, httpx2.AsyncClient(trust_env=False) as http:
        made.stub.permits = asyncio.Semaphore(2)
        url, body = (
            f"{made.url}/inference/chat_completion",
            chat(stream=streams).model_dump(mode="json", exclude_none=True),
        )
        call = asyncio.create_task(http.send(http.build_request("POST", url, json=body), stream=True))
        await asyncio.wait_for(made.stub.until(steps=2), 10)
        if streams:
            await (await call).aclose()
        call.cancel()
        await asyncio.wait([call])
        await asyncio.wait_for(made.stub.until(stopped=1), 10)
        assert (made.stub.steps, made.stub.finished) == (2, 0)


async def test_a_request_is_refused_before_it_travels() -> None:
    """The near server validates; the far one need not be asked."""
    async with chain() as made, httpx2.AsyncClient(trust_env=False) as http:
        steps = made.stub.steps
        answer = await http.post(f"{made.url}/inference/chat_completion", json={"model": "stub"})
    assert (answer.status_code, made.stub.steps) == (InvalidRequestError.status, steps)


# start


async def test_a_far_stack_that_is_down_is_a_start_error_without_its_address(caplog: pytest.LogCaptureFixture) -> None:
    """The words reach clients where the provider is optional; the address is the operator's, and is in the log."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    stack = near_stack(f"http://127.0.0.1:{port}")
    with pytest.raises(ProviderStartError, match="cannot connect to the remote stack") as caught:
        async with running(stack):
            pass
    assert str(port) not in str(caught.value)
    assert str(port) in caplog.text


async def test_an_optional_far_stack_may_come_later() -> None:
    """The near stack starts without it, answers 503 with the reason, and finds it when it is there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    stub = StubPlugin()
    near = near_stack(f"http://127.0.0.1:{port}", optional=True)
    async with running(near):
        assert near.is_ready
        with pytest.raises(ProviderUnavailableError, match="cannot connect to the remote stack"):
            await near.api(Inference).chat_completion(chat())
        far = Stack(distribution({"inference": [{"provider": "stub"}]}, port), Registry(discover([stub])))
        async with served(far):
            while near.status()[0].state is not State.READY:
                await asyncio.sleep(0.05)
            assert whole(await near.api(Inference).chat_completion(chat())).content == "Hello from the stub."


async def test_a_far_stack_that_goes_down_answers_502() -> None:
    """Upstream is the word for it, and the client may try again."""
    stub = StubPlugin()
    async with AsyncExitStack() as stack:
        far = AsyncExitStack()
        url = await far.enter_async_context(served(far_stack(stub)))
        near = near_stack(url)
        await stack.enter_async_context(running(near))
        await far.aclose()
        with pytest.raises(UpstreamError, match="cannot connect to the remote stack") as caught:
            await near.api(Inference).chat_completion(chat())
    assert url.rpartition(":")[2] not in caught.value.detail
    assert caught.value.retriable


async def test_a_far_stack_without_the_api_is_refused_with_what_it_serves() -> None:
    """A wrong address, or a wrong key in the YAML: found before the first request."""
    async with served(far_stack(StubPlugin())) as url:
        with pytest.raises(ProviderStartError, match="does not serve 'safety'; it serves: inference"):
            async with running(near_stack(url, api="safety")):
                pass


@pytest.mark.parametrize(
    "answer",
    [
        sent_whole(b"<html>hello</html>", "text/html"),
        sent_whole(b"{}", status=404),
        sent_whole(b'{"data": []}'),
    ],
)
async def test_a_server_that_is_no_stack_is_refused(answer: Any) -> None:
    """Some other service may listen there."""
    async with ScriptedServer(answer) as server:
        with pytest.raises(ProviderStartError, match="the remote stack"):
            async with running(near_stack(server.url)):
                pass


async def test_a_far_server_that_redirects_is_refused_without_the_address_it_names() -> None:
    """The operator has to name the right address; which hosts there are behind this one is nothing for clients."""
    async with ScriptedServer(sent_whole(b"", None, status=307, location="http://inner.example/")) as server:
        with pytest.raises(ProviderStartError, match="the remote stack redirects GET /providers/list") as caught:
            async with running(near_stack(server.url)):
                pass
    assert "inner.example" not in str(caught.value)


async def test_a_provider_that_is_not_up_over_there_is_not_up_here() -> None:
    """Or the near stack would say that it is ready and answer 503."""
    listed = b'[{"api": "inference", "provider": "x", "id": "x", "state": "failed", "reason": "r"}]'
    async with ScriptedServer(sent_whole(listed)) as server:
        with pytest.raises(ProviderStartError, match="does not serve 'inference' now: its provider is failed"):
            async with running(near_stack(server.url)):
                pass


async def test_the_key_is_sent_and_never_shown() -> None:
    """A secret is redacted by its type."""
    listed = b'[{"api": "inference", "provider": "x", "id": "x", "state": "ready"}]'
    async with ScriptedServer(sent_whole(listed)) as server:
        stack = near_stack(server.url, config={"api_key": "k-123"})
        async with running(stack):
            pass
    assert server.requests[0].headers["authorization"] == "Bearer k-123"
    assert "k-123" not in repr(RemoteConfig(url="http://x", api_key="k-123"))


@pytest.mark.parametrize("url", ["x", "ftp://x", "http://", "http://user:secret@x", "http://x?y", "http://[::1"])
async def test_an_address_that_is_none_is_a_fault_of_the_distribution(url: str) -> None:
    """Found by ``check``, without a connection."""
    with pytest.raises(ValidationError, match="write http://HOST:PORT"):
        RemoteConfig(url=url)


async def test_a_file_of_authorities_that_cannot_be_read_is_a_start_error() -> None:
    """Not the system's authorities in its place."""
    with pytest.raises(ProviderStartError, match="'ca_file' is no readable PEM file"):
        async with running(near_stack("https://127.0.0.1:1", config={"ca_file": "/does/not/exist.pem"})):
            pass


# any API


class Weather(Api, name="weather"):
    """A third party's contract."""

    @post("/weather/in")
    async def weather(self, city: str, days: int = 1) -> list[str]:
        raise NotImplementedError


class Rain(Weather):
    async def weather(self, city: str, days: int = 1) -> list[str]:
        return [f"rain in {city}"] * days


class WeatherPlugin:
    @hookimpl
    def llama_stack_apis(self) -> list[ApiSpec]:
        return [ApiSpec(api=Weather)]

    @hookimpl
    def llama_stack_providers(self) -> list[ProviderSpec]:
        @asynccontextmanager
        async def start() -> AsyncIterator[Weather]:
            yield Rain()

        return [ProviderSpec(api=Weather, name="rain", start=start)]


async def test_a_third_partys_api_is_served_by_another_stack_too() -> None:
    """``remote`` knows no list of APIs."""
    far = Stack(distribution({"weather": [{"provider": "rain"}]}), Registry(discover([WeatherPlugin()])))
    async with served(far) as url:
        entries = {"weather": [{"provider": "remote", "config": {"url": url}}]}
        near = Stack(distribution(entries), Registry(discover([WeatherPlugin()])))
        async with served(near) as near_url, AsyncClient(near_url) as client:
            assert await client.api(Weather).weather("Bern", days=2) == ["rain in Bern"] * 2


def test_an_api_that_is_imported_later_has_its_remote_provider_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plugins are imported as they are named, so ``remote`` may be there before the contract is."""
    source = f"from {__name__} import WeatherPlugin\nplugin = WeatherPlugin()"
    install(tmp_path, "acme-weather", {"acme_weather": source}, {"weather": "acme_weather:plugin"})
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry()
    registry.provider(Inference, "remote")
    assert [loaded.name for loaded in registry.loaded] == ["remote"]
    weather = registry.api("weather")
    found = registry.provider(weather, "remote")
    assert (found.plugin.name, found.spec.api) == ("remote", weather)
    assert registry.duplicates == []


def test_every_api_has_its_remote_provider_and_each_keeps_its_contract() -> None:
    """The load-time check of providers passes for all of them."""
    specs: Sequence[ProviderSpec] = list(plugin.llama_stack_providers(APIS))
    assert [spec.api for spec in specs] == list(APIS)
    for spec in specs:
        assert declaration_problems(spec) == []
        assert operations(spec.api)

"""Providers that stand before others, of APIs that they were never told about."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_stack.apis import Api, Inference, operations, post
from llama_stack.apis.common import Dialog, Id, Message, SamplingParams, StopReason
from llama_stack.apis.inference import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
)
from llama_stack.client import AsyncClient
from llama_stack.distribution import Distribution, check_distribution
from llama_stack.errors import (
    ModelNotFoundError,
    NotFoundError,
    OverloadedError,
    ProviderStartError,
    StackError,
    UnavailableError,
)
from llama_stack.plugins import ApiSpec, ProviderSpec, discover, hookimpl
from llama_stack.registry import Registry
from llama_stack.stack import Stack, running
from llama_stack.testing.conformance import conformance
from llama_stack.testing.stub_inference import StubPlugin

pytestmark = pytest.mark.anyio

Entry = dict[str, Any]


@asynccontextmanager
async def stack(folder: Path, entry: Entry, *plugins: object, api: str = "inference") -> AsyncIterator[AsyncClient]:
    """A client of a stack whose only provider of the API is this one."""
    value = {"version": 1, "name": "composed", "providers": {api: [entry]}}
    made = Stack(Distribution.model_validate(value), Registry(discover(plugins)), state_folder=folder)
    async with running(made), AsyncClient.over(made) as client:
        yield client


def stub(id: str, *pieces: str, **config: Any) -> Entry:
    return {"provider": "stub", "id": id, "config": {"pieces": list(pieces or ("one ", "two")), **config}}


async def text(client: AsyncClient, *, stream: bool = False, **more: Any) -> str:
    request = ChatCompletionRequest(model="stub", dialog=Dialog(message=Message.user("hello")), stream=stream, **more)
    answer = await client.inference.chat_completion(request)
    if isinstance(answer, ChatCompletionResponse):
        return str(answer.content)
    return "".join([chunk.text_delta async for chunk in answer])


@pytest.mark.parametrize("stream", [False, True])
async def test_fallback_asks_the_next_one_when_the_first_cannot_serve(stream: bool, tmp_path: Path) -> None:
    """Before the first item of a stream nobody has heard anything yet."""
    plugin = StubPlugin()
    entry = {"provider": "fallback", "config": {"providers": [stub("a", "first"), stub("b", "second")]}}
    async with stack(tmp_path, entry, plugin) as client:
        assert await text(client, stream=stream) == "first"
        plugin.started[0].failure = OverloadedError("full")
        assert await text(client, stream=stream) == "second"
        plugin.started[0].failure = ZeroDivisionError("a defect is an outage too")
        assert await text(client, stream=stream) == "second"
        plugin.started[1].failure = OverloadedError("full too")
        with pytest.raises(OverloadedError, match="full too"):
            await text(client, stream=stream)


async def test_fallback_passes_on_a_refusal_and_a_stream_that_broke_in_the_middle(tmp_path: Path) -> None:
    """Another provider would refuse the same request, and half an answer cannot be unsaid."""
    plugin = StubPlugin()
    entry = {"provider": "fallback", "config": {"providers": [stub("a", "1", "2"), stub("b", "second")]}}
    async with stack(tmp_path, entry, plugin) as client:
        plugin.started[0].failure = ModelNotFoundError("stub", [])
        with pytest.raises(ModelNotFoundError):
            await text(client)
        assert plugin.started[1].steps == 0
        plugin.started[0].failure, plugin.started[0].fail_at = OverloadedError("broke"), 1
        with pytest.raises(OverloadedError):
            await text(client, stream=True)
        assert plugin.started[1].steps == 0


async def test_fallback_goes_on_without_one_that_does_not_start_or_is_slow(tmp_path: Path) -> None:
    """A server that is away when the stack starts is what a fallback is for."""
    plugin = StubPlugin()
    away = {"provider": "remote", "config": {"url": "http://127.0.0.1:1"}}
    config = {"providers": [away, stub("slow", delay_seconds=60), stub("quick", "quick")], "answer_seconds": 0.2}
    async with stack(tmp_path, {"provider": "fallback", "config": config}, plugin) as client:
        assert await text(client) == "quick"
        assert plugin.started[0].stopped == 1
    nobody = {"provider": "fallback", "config": {"providers": [away, away | {"id": "other"}]}}
    with pytest.raises(ProviderStartError, match="none of the providers behind fallback starts"):
        async with stack(tmp_path / "second", nobody):
            pass


async def test_a_client_that_leaves_stops_the_provider_behind(tmp_path: Path) -> None:
    """Whatever stands between: a stream that is closed is closed to its end."""
    for name, config in (
        ("fallback", {"providers": [stub("a", repeat=99), stub("b")]}),
        ("canary", {"stable": stub("a", repeat=99), "canary": stub("b", repeat=99), "share": 0.0}),
        ("shadow", {"primary": stub("a", repeat=99), "shadow": stub("b")}),
        ("cache", {"provider": stub("a", repeat=99), "operations": ["POST /inference/chat_completion"]}),
        ("record", {"provider": stub("a", repeat=99), "file": str(tmp_path / "calls.jsonl")}),
    ):
        plugin = StubPlugin()
        async with stack(tmp_path / name, {"provider": name, "config": config}, plugin) as client:
            request = ChatCompletionRequest(model="stub", dialog=Dialog(message=Message.user("hello")), stream=True)
            chunks: Any = await client.inference.chat_completion(request)
            await anext(chunks)
            await chunks.aclose()
            assert plugin.started[0].stopped == 1, name


async def test_a_canary_gets_its_share_and_its_failures_are_not_heard(tmp_path: Path) -> None:
    """A share of 1 in 4 of 400 requests, the same ones with the same seed."""
    plugin = StubPlugin()
    config = {"stable": stub("s", "stable"), "canary": stub("c", "canary"), "share": 0.25, "seed": 3}
    async with stack(tmp_path, {"provider": "canary", "config": config}, plugin) as client:
        answers = [await text(client) for _ in range(400)]
        assert 70 < answers.count("canary") < 130
        plugin.started[1].failure = OverloadedError("not yet")
        assert {await text(client) for _ in range(40)} == {"stable"}
    async with stack(tmp_path, {"provider": "canary", "config": config}, StubPlugin()) as client:
        assert [await text(client) for _ in range(400)] == answers
    strict = {"provider": "canary", "config": config | {"share": 1.0, "falls_back": False}}
    async with stack(tmp_path, strict, plugin := StubPlugin()) as client:
        plugin.started[1].failure = OverloadedError("not yet")
        with pytest.raises(OverloadedError):
            await text(client)


async def test_a_shadow_is_asked_the_same_and_never_heard(tmp_path: Path) -> None:
    """What it answers is counted; what it does wrong, or how long it takes, is nobody's trouble."""
    plugin = StubPlugin()
    config = {"primary": stub("p", "said"), "shadow": stub("s", "said"), "max_pending": 1}
    async with stack(tmp_path, {"provider": "shadow", "config": config}, plugin) as client:
        primary, shadow = plugin.started
        assert await text(client) == "said"
        await counted(client, same=1)
        assert await text(client, stream=True) == "said"
        await counted(client, same=2)
        shadow.config = shadow.config.model_copy(update={"pieces": ("other",)})
        assert await text(client) == "said"
        await counted(client, same=2, different=1)
        shadow.failure = ZeroDivisionError("oops")
        assert await text(client) == "said"
        await counted(client, same=2, different=1, failed=1)
        shadow.failure, shadow.permits = None, asyncio.Semaphore(0)
        assert [await text(client) for _ in range(3)] == ["said"] * 3
        await counted(client, same=2, different=1, failed=1, left_out=2)
        assert primary.finished == 7
    assert shadow.stopped == 1, "the stop ends what the shadow still works at"


async def test_a_cache_gives_an_answer_again_and_keeps_to_its_bounds(tmp_path: Path) -> None:
    """Whole answers alone, none that was drawn, and the oldest goes first."""
    plugin = StubPlugin()
    operations = ["POST /inference/chat_completion", "POST /inference/batch_completion"]
    config = {"provider": stub("a"), "operations": operations, "max_entries": 2}
    async with stack(tmp_path, {"provider": "cache", "config": config}, plugin) as client:
        [model] = plugin.started
        assert [await text(client) for _ in range(3)] == ["one two"] * 3
        assert model.finished == 1
        assert [await text(client, stream=True) for _ in range(3)] == ["one two"] * 3
        assert model.finished == 2
        drawn = SamplingParams(temperature=1.0)
        assert [await text(client, sampling_params=drawn) for _ in range(2)] == ["one two"] * 2
        assert model.finished == 4
        await text(client, max_tokens=7)
        await text(client)
        assert model.finished == 6, "the first was asked for longest ago and has made room"
        model.failure = OverloadedError("full")
        with pytest.raises(OverloadedError):
            await text(client, max_tokens=8)
        model.failure = None
        assert await text(client, max_tokens=8) == "one two"
        request = CompletionRequest(content="a", model="stub")
        for _ in range(2):
            await client.inference.completion(request)
        assert model.finished == 9, "an operation that is not named is not kept"


async def test_a_cache_forgets_in_time(tmp_path: Path) -> None:
    """What was true a while ago may not be."""
    plugin = StubPlugin()
    config = {"provider": stub("a"), "operations": ["POST /inference/chat_completion"], "ttl_seconds": 0.05}
    async with stack(tmp_path, {"provider": "cache", "config": config}, plugin) as client:
        await text(client)
        await asyncio.sleep(0.1)
        await text(client)
        assert plugin.started[0].finished == 2


@pytest.mark.parametrize(
    ("operations", "said"),
    [(["POST /inference/chat"], "did you mean 'POST /inference/chat_completion'"), (["x"], "no operation 'x'")],
)
async def test_an_operation_that_is_none_is_refused(operations: list[str], said: str, tmp_path: Path) -> None:
    """It would never be kept."""
    config = {"provider": stub("a"), "operations": operations}
    with pytest.raises(ProviderStartError, match=said):
        async with stack(tmp_path, {"provider": "cache", "config": config}, StubPlugin()):
            pass


async def test_what_was_recorded_is_replayed_without_the_provider(tmp_path: Path) -> None:
    """Answers, streams, lists, refusals, and failures in the middle of a stream, in their order."""
    plugin = StubPlugin()
    file = tmp_path / "calls" / "inference.jsonl"
    entry = {"provider": "record", "config": {"provider": stub("a"), "file": str(file)}}
    async with stack(tmp_path, entry, plugin) as client:
        models = [model.model async for model in await client.models.list_models()]
        assert await text(client) == "one two"
        plugin.started[0].config = plugin.started[0].config.model_copy(update={"pieces": ("three",)})
        assert await text(client) == "three"
        assert await text(client, stream=True) == "three"
        plugin.started[0].failure, plugin.started[0].fail_at = OverloadedError("canary words"), 0
        for stream in (False, True):
            with pytest.raises(OverloadedError):
                await text(client, max_tokens=3, stream=stream)
    assert file.stat().st_mode & 0o077 == 0, "it holds what clients said"
    with file.open("a") as cut:
        cut.write('{"call": "cut in the mid')
    replay = {"provider": "replay", "config": {"file": str(file)}}
    async with stack(tmp_path, replay) as client:
        assert [model.model async for model in await client.models.list_models()] == models
        assert [await text(client) for _ in range(3)] == ["one two", "three", "three"]
        assert await text(client, stream=True) == "three"
        for stream in (False, True):
            with pytest.raises(OverloadedError, match="canary words"):
                await text(client, max_tokens=3, stream=stream)
        with pytest.raises(NotFoundError, match="not in the recording"):
            await text(client, max_tokens=99)
    once = {"provider": "replay", "config": {"file": str(file), "repeats": False}}
    async with stack(tmp_path, once) as client:
        assert [await text(client) for _ in range(2)] == ["one two", "three"]
        with pytest.raises(NotFoundError):
            await text(client)


@pytest.mark.parametrize("content", [None, "not json\n", "[]\n", '{"value": 1}\n'])
async def test_a_file_that_is_no_recording_is_refused(content: str | None, tmp_path: Path) -> None:
    """With its line."""
    file = tmp_path / "calls.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ProviderStartError, match=r"cannot be read|line 1 is no recorded call"):
        async with stack(tmp_path, {"provider": "replay", "config": {"file": str(file)}}):
            pass


class Weather(Api, name="weather", routed_by="city"):
    """An API that the core does not know."""

    @post("/weather/forecast")
    async def forecast(self, city: Id) -> str:
        """What it will be like."""
        raise NotImplementedError

    @post("/weather/days")
    async def days(self, city: Id) -> AsyncIterator[str]:
        """Day by day."""
        raise NotImplementedError


class Station(Weather):
    """Says the same every day, or fails."""

    def __init__(self, said: str, failure: StackError | None = None) -> None:
        self.said, self.failure, self.calls = said, failure, 0

    async def forecast(self, city: Id) -> str:
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        return f"{self.said} in {city}"

    async def days(self, city: Id) -> AsyncIterator[str]:
        async def each() -> AsyncIterator[str]:
            for day in ("mon", "tue"):
                yield f"{day}: {await self.forecast(city)}"

        return each()


def weather(**stations: Station) -> SimpleNamespace:
    """A plugin that brings the API and these providers of it."""

    def start_of(station: Station) -> Callable[..., Any]:
        async def start() -> AsyncIterator[Weather]:
            yield station

        return asynccontextmanager(start)

    specs = [ProviderSpec(api=Weather, name=name, start=start_of(one)) for name, one in stations.items()]
    return SimpleNamespace(
        llama_stack_apis=hookimpl(specname="llama_stack_apis")(lambda: [ApiSpec(api=Weather)]),
        llama_stack_providers=hookimpl(specname="llama_stack_providers")(lambda: specs),
    )


async def test_a_third_partys_api_has_them_too(tmp_path: Path) -> None:
    """They are made from the contract: nothing in them names an API."""
    sunny, dead = Station("sun"), Station("rain", UnavailableError("no station"))
    plugin = weather(sunny=sunny, dead=dead)
    file = str(tmp_path / "weather.jsonl")
    inner = {"provider": "fallback", "config": {"providers": [{"provider": "dead"}, {"provider": "sunny"}]}}
    cached = {"provider": "cache", "config": {"provider": inner, "operations": ["POST /weather/forecast"]}}
    entry = {"provider": "record", "config": {"provider": cached, "file": file}}
    async with stack(tmp_path, entry, plugin, api="weather") as client:
        api = client.api(Weather)
        assert [await api.forecast("oslo") for _ in range(2)] == ["sun in oslo"] * 2
        assert [day async for day in await api.days(city="oslo")] == ["mon: sun in oslo", "tue: sun in oslo"]
        assert (dead.calls, sunny.calls) == (2, 3)
    replay = {"provider": "replay", "config": {"file": file}}
    async with stack(tmp_path, replay, plugin, api="weather") as client:
        assert await client.api(Weather).forecast("oslo") == "sun in oslo"
        assert [day async for day in await client.api(Weather).days("oslo")] == ["mon: sun in oslo", "tue: sun in oslo"]


def test_what_is_wrong_behind_a_provider_is_a_fault_at_its_own_line(tmp_path: Path) -> None:
    """Names, settings, needs, and two of one id, however deep."""
    file = tmp_path / "stack.yaml"
    file.write_text(
        "version: 1\nname: composed\nproviders:\n  safety:\n    - provider: fallback\n      config:\n"
        "        providers:\n"
        "          - provider: llama_gard\n"
        "          - {provider: prompt_guard, config: {treshold: 1}}\n"
        "          - provider: llama_guard\n"
        "            config: {model: m}\n"
        "          - provider: llama_guard\n"
        "            config: {model: m}\n"
    )
    faults = [str(fault) for fault in check_distribution(file, environ={}, registry=Registry())]
    places = ("config.providers[0].provider", "config.providers[1].config.treshold", "config.providers[3]")
    for line, place, said in zip((8, 9, 12), places, ("llama_guard", "", "is taken by"), strict=True):
        assert any(f"{file}:{line}:" in fault and place in fault and said in fault for fault in faults), (place, faults)
    assert sum("needs the API 'inference'" in fault for fault in faults) == 2


async def test_providers_behind_one_have_tables_of_their_own(tmp_path: Path) -> None:
    """Two stores of one kind behind a shadow must not write into each other."""
    config = {"primary": {"provider": "sqlite", "id": "a"}, "shadow": {"provider": "sqlite", "id": "b"}}
    async with stack(tmp_path, {"provider": "shadow", "config": config}, api="memory_banks") as client:
        await client.memory_banks.create("bank", "A bank", [])
        assert [bank.uuid async for bank in await client.memory_banks.list_banks()] == ["bank"]


def outcomes(client: AsyncClient) -> dict[str, int]:
    """The counters of the only provider."""
    [(_, provider)] = client._source.providers  # type: ignore[attr-defined]
    [family] = provider.prometheus_metrics()
    return {sample.labels["outcome"]: int(sample.value) for sample in family.samples}


async def counted(client: AsyncClient, **expected: int) -> None:
    """Wait until the counters of the only provider say this."""
    async with asyncio.timeout(10):
        while outcomes(client) != expected:
            await asyncio.sleep(0.01)


def test_a_recorded_line_is_json(tmp_path: Path) -> None:
    """One call a line, which other tools read too."""
    asyncio.run(_record_one(tmp_path))
    [line] = (tmp_path / "calls.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert json.loads(found["call"])[0] == "POST /inference/completion"
    assert found["value"] == {"content": "one two", "stop_reason": "finished_ok"}


async def _record_one(folder: Path) -> None:
    entry = {"provider": "record", "config": {"provider": stub("a"), "file": str(folder / "calls.jsonl")}}
    async with stack(folder, entry, StubPlugin()) as client:
        answer = await client.inference.completion(CompletionRequest(content="a", model="stub"))
        assert isinstance(answer, CompletionResponse)
        assert answer.stop_reason is StopReason.FINISHED_OK


STUB = {"provider": "stub", "config": {"models": ["stub"]}}
OTHER = {"provider": "stub", "id": "other", "config": {"models": ["stub"]}}

test_fallback_conforms = conformance("inference", "fallback", config={"providers": [STUB, OTHER]}, model="stub")
test_canary_conforms = conformance(
    "inference", "canary", config={"stable": STUB, "canary": OTHER, "share": 0.5}, model="stub"
)
test_shadow_conforms = conformance("inference", "shadow", config={"primary": STUB, "shadow": OTHER}, model="stub")
test_cache_conforms = conformance(
    "inference",
    "cache",
    config={"provider": STUB, "operations": [op.key for op in operations(Inference) if not op.is_extension]},
    model="stub",
)

"""What the server says about itself."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial

import httpx2
import pytest
from prometheus_client.core import CounterMetricFamily, Metric

from llama_stack.apis import Inference, NoConfig
from llama_stack.apis.inference import ChatCompletionRequest, ChatCompletionResponse
from llama_stack.distribution import Distribution
from llama_stack.errors import (
    CheckpointError,
    NotFoundError,
    ProviderStartError,
    StackError,
    StoreError,
    StoreUnavailableError,
    UpstreamError,
)
from llama_stack.plugins import ProviderSpec, discover, hookimpl
from llama_stack.registry import Registry
from llama_stack.server import create_app
from llama_stack.server.log import JsonFormatter, LineWriter
from llama_stack.stack import Stack, running
from llama_stack.testing.stub_inference import StubInference
from tests.server.serving import CHAT, CHAT_PATH, Serving, problem_of, serving, stub_stack

pytestmark = pytest.mark.anyio


@pytest.fixture
async def served() -> AsyncIterator[Serving]:
    async with serving() as found:
        yield found


def client_of(stack: Stack) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(create_app(stack)), base_url="http://localhost")


class Moody:
    """A plugin whose only provider starts when it is told to."""

    def __init__(self, failure: Exception | None = None, provider: Inference | None = None) -> None:
        self.may_start = asyncio.Event()
        self.failure = failure
        self.provider = provider or StubInference()

    @hookimpl
    def llama_stack_providers(self) -> list[ProviderSpec]:
        @asynccontextmanager
        async def start(config: NoConfig) -> AsyncIterator[Inference]:
            await self.may_start.wait()
            if self.failure is not None:
                raise self.failure
            yield self.provider

        return [ProviderSpec(api=Inference, name="moody", start=start)]

    def stack(self, *, optional: bool = False) -> Stack:
        entry = {"provider": "moody", "optional": optional}
        found = Distribution.model_validate({"version": 1, "name": "moody", "providers": {"inference": [entry]}})
        return Stack(found, Registry(discover(extra=[self])))


async def test_starting_server_lives_and_is_not_ready() -> None:
    """Live means: do not restart me. Ready means: send me work. A model may take minutes to load."""
    moody = Moody()
    stack = moody.stack()
    async with client_of(stack) as client:
        starting = asyncio.create_task(stack.start())
        await asyncio.sleep(0)
        assert (await client.get("/health/live")).status_code == 200
        response = await client.get("/health/ready")
        document = problem_of(response)
        assert (document["status"], document["error"]["code"]) == (503, "not_ready")
        assert document["providers"][0]["state"] == "starting"
        assert response.headers["retry-after"] == "1"
        assert problem_of(await client.post(CHAT_PATH, json=CHAT))["status"] == 503
        moody.may_start.set()
        await starting
        response = await client.get("/health/ready")
        assert response.json()["providers"][0]["state"] == "ready"
        await stack.stop()


async def test_readiness_holds_what_a_provider_says_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    """Which of two ways of working is active is the operator's business; a provider's slip is nobody else's."""

    class Telling(StubInference):
        async def owns(self, resource: str) -> bool:
            return False

        def readiness_details(self) -> dict[str, str]:
            return {"detector": "built-in"}

    class Slipping(Telling):
        def readiness_details(self) -> dict[str, str]:
            raise RuntimeError("no details")

    class Plugin:
        @hookimpl
        def llama_stack_providers(self) -> list[ProviderSpec]:
            @asynccontextmanager
            async def start_telling() -> AsyncIterator[Inference]:
                yield Telling()

            @asynccontextmanager
            async def start_slipping() -> AsyncIterator[Inference]:
                yield Slipping()

            return [
                ProviderSpec(api=Inference, name="telling", start=start_telling),
                ProviderSpec(api=Inference, name="slipping", start=start_slipping),
            ]

    entries = [{"provider": "telling"}, {"provider": "slipping"}]
    found = Distribution.model_validate({"version": 1, "name": "t", "providers": {"inference": entries}})
    async with running(Stack(found, Registry(discover([Plugin()])[:1]))) as stack, client_of(stack) as client:
        response = await client.get("/health/ready")
    assert response.status_code == 200
    assert [provider.get("details") for provider in response.json()["providers"]] == [{"detector": "built-in"}, None]
    assert "no details" in caplog.text


async def test_failed_required_provider_is_not_ready_and_says_why() -> None:
    """The reason is the provider's own words where it is one of our errors."""
    moody = Moody(UpstreamError("the engine at port 9 does not answer"))
    moody.may_start.set()
    stack = moody.stack()
    async with client_of(stack) as client:
        with pytest.raises(ProviderStartError):
            await stack.start()
        document = problem_of(await client.get("/health/ready"))
        assert document["providers"][0]["reason"] == "the engine at port 9 does not answer"
        await stack.stop()


async def test_failed_optional_provider_is_listed_and_does_not_matter() -> None:
    """The rest of the stack serves; its own API answers 503 with the reason."""
    moody = Moody(UpstreamError("the engine does not answer"))
    moody.may_start.set()
    stack = moody.stack(optional=True)
    async with running(stack), client_of(stack) as client:
        response = await client.get("/health/ready")
        assert response.status_code == 200
        assert response.json()["providers"][0]["state"] == "failed"
        document = problem_of(await client.post(CHAT_PATH, json=CHAT))
        assert document["error"]["code"] == "provider_unavailable"
        assert "the engine does not answer" in document["detail"]


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (CheckpointError("/srv/models/llama: no such folder"), "invalid checkpoint; see the server's log"),
        (StoreError("/srv/state/store.sqlite cannot be opened"), "store cannot be used; see the server's log"),
        (StoreUnavailableError("postgresql://db:5432/srv"), "store unavailable; see the server's log"),
    ],
)
async def test_what_a_failed_start_says_of_this_machine_is_for_its_operator(
    failure: StackError, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Errors that name files are the operator's; a client has no use for a path (the error contract)."""
    moody = Moody(failure)
    moody.may_start.set()
    async with running(moody.stack(optional=True)) as stack, client_of(stack) as client:
        listed = (await client.get("/health/ready")).json()["providers"][0]
        document = problem_of(await client.post(CHAT_PATH, json=CHAT))
    assert listed["reason"] == told
    assert told in document["detail"]
    assert "/srv" not in document["detail"]
    assert "/srv" in caplog.text


@pytest.mark.parametrize("optional", [False, True])
async def test_a_provider_that_is_up_and_cannot_serve_is_not_ready(
    optional: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A balancer sends requests elsewhere while an engine restarts; those that come all the same are not refused."""

    class Recovering(StubInference):
        trouble: str | None = None
        fault: Exception | None = None

        def unready_reason(self) -> str | None:
            if self.fault is not None:
                raise self.fault
            return self.trouble

    provider = Recovering()
    moody = Moody(provider=provider)
    moody.may_start.set()
    async with running(moody.stack(optional=optional)) as stack, client_of(stack) as client:
        assert (await client.get("/health/ready")).status_code == 200
        provider.trouble = "model 'm' is being restarted"
        response = await client.get("/health/ready")
        assert response.status_code == (200 if optional else 503)
        status = response.json()["providers"][0]
        assert (status["state"], status["reason"]) == ("recovering", "model 'm' is being restarted")
        assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 200
        metrics = (await client.get("/metrics")).text
        assert 'llama_stack_provider_up{api="inference",id="moody",provider="moody"} 0.0' in metrics
        provider.fault = RuntimeError("secret")
        response = await client.get("/health/ready")
        assert response.json()["providers"][0]["reason"] == "it fails to say whether it is ready; see the server's log"
        assert "secret" in caplog.text
        provider.trouble = provider.fault = None
        response = await client.get("/health/ready")
        assert response.status_code == 200
        assert "reason" not in response.json()["providers"][0]


async def test_providers_are_listed_as_lines_or_as_an_array(served: Serving) -> None:
    """The server's own lists follow the rule of all lists."""
    lines = await served.client.get("/providers/list")
    array = await served.client.get("/providers/list", headers={"accept": "application/json"})
    assert lines.headers["content-type"] == "application/jsonl"
    assert [json.loads(line) for line in lines.text.splitlines()] == array.json()
    assert array.json()[0]["id"] == "stub"


async def test_version_names_what_runs(served: Serving) -> None:
    """For bug reports."""
    about = (await served.client.get("/version")).json()
    assert (about["name"], about["specification"], about["distribution"]) == ("llama-stack", "0.0.1", "served")


async def test_documents_are_served(served: Serving) -> None:
    """The draft's operations in one, everything else in the other."""
    draft = (await served.client.get("/openapi.json")).json()
    extensions = (await served.client.get("/openapi-ext.json")).json()
    assert CHAT_PATH in draft["paths"]
    assert "/inference/embeddings" not in draft["paths"]
    assert "/inference/embeddings" in extensions["paths"]


async def test_metrics_label_routes_by_template_and_never_by_path(served: Serving) -> None:
    """A client that asks for a million paths must not make a million series."""
    await served.client.post(f"{CHAT_PATH}/", json=CHAT)
    await served.client.get("/canary-path?canary=query")
    await served.client.request("CANARY", "/version")
    text = (await served.client.get("/metrics")).text
    assert "canary" not in text.lower()
    assert f'code="ok",method="POST",route="{CHAT_PATH}",status="200"' in text
    assert 'code="route_not_found",method="GET",route="unmatched",status="404"' in text
    assert 'code="method_not_allowed",method="other",route="/version",status="405"' in text
    assert 'llama_stack_provider_up{api="inference",id="stub",provider="stub"} 1.0' in text


async def test_codes_that_a_far_server_makes_up_do_not_fill_the_metrics(
    served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its errors pass through with their codes; each new label would stay in memory, and in Prometheus, for good."""
    calls = 0

    async def made_up(request: ChatCompletionRequest) -> ChatCompletionResponse:
        nonlocal calls
        calls += 1
        raise StackError.revive(f"made_up_{calls}", "no", status=418)  # as the client of the far server does

    monkeypatch.setattr(served.stub, "chat_completion", made_up)
    for _ in range(250):
        assert (await served.client.post(CHAT_PATH, json=CHAT)).status_code == 418
    text = (await served.client.get("/metrics")).text
    assert 150 < text.count('requests_total{code="made_up_') <= 200
    assert 'code="other",method="POST"' in text


async def test_metrics_hold_what_the_providers_say_of_themselves(caplog: pytest.LogCaptureFixture) -> None:
    """One family a name, though two providers are of one kind; and one that fails hides nobody's."""

    class Counting(StubInference):
        def __init__(self, tokens: int) -> None:
            super().__init__()
            self.tokens = tokens

        async def owns(self, resource: str) -> bool:
            return False

        def prometheus_metrics(self) -> Iterable[Metric]:
            if not self.tokens:
                raise RuntimeError("no figures")
            family = CounterMetricFamily("counting_tokens", "Tokens counted.", labels=("model",))
            family.add_metric(("m",), self.tokens)
            yield family

    class Plugin:
        @hookimpl
        def llama_stack_providers(self) -> list[ProviderSpec]:
            @asynccontextmanager
            async def start(tokens: int) -> AsyncIterator[Inference]:
                yield Counting(tokens)

            return [ProviderSpec(api=Inference, name=f"n{count}", start=partial(start, count)) for count in (3, 0, 5)]

    entries = [{"provider": f"n{count}"} for count in (3, 0, 5)]
    found = Distribution.model_validate({"version": 1, "name": "t", "providers": {"inference": entries}})
    async with running(Stack(found, Registry(discover([Plugin()])[:1]))) as stack, client_of(stack) as client:
        lines = (await client.get("/metrics")).text.splitlines()
    assert [line for line in lines if "counting_tokens" in line] == [
        "# HELP counting_tokens_total Tokens counted.",
        "# TYPE counting_tokens_total counter",
        'counting_tokens_total{api="inference",id="n3",model="m"} 3.0',
        'counting_tokens_total{api="inference",id="n5",model="m"} 5.0',
    ]
    assert "provider 'n0' of 'inference' failed to give its metrics" in caplog.text


async def test_metrics_of_two_servers_in_one_process_are_apart() -> None:
    """The default registry of the Prometheus client is one a process."""
    async with serving() as one, serving() as other:
        await one.client.post(CHAT_PATH, json=CHAT)
        assert f'route="{CHAT_PATH}"' in (await one.client.get("/metrics")).text
        assert f'route="{CHAT_PATH}"' not in (await other.client.get("/metrics")).text


async def test_every_request_is_one_log_line_without_content(served: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """Bodies, queries, headers and raw paths hold what is nobody's business but the client's."""
    caplog.set_level(logging.INFO, "llama_stack.access")
    body = {"model": "stub", "dialog": {"message": {"role": "user", "content": "canary-body"}}}
    headers = {"x-request-id": "r-1", "authorization": "Bearer canary-key", "x-other": "canary-header"}
    await served.client.post(CHAT_PATH, json=body, headers=headers)
    await served.client.request("CANARY-METHOD", "/canary-path?canary=query", headers={"x-request-id": "r-2"})
    served.stub.failure = NotFoundError("canary-detail")
    await served.client.post(CHAT_PATH, json=body, headers={"x-request-id": "r-3"})
    records = [record for record in caplog.records if record.name == "llama_stack.access"]
    lines = [json.loads(JsonFormatter().format(record)) for record in records]
    assert [(line["id"], line["route"], line["status"], line["code"]) for line in lines] == [
        ("r-1", CHAT_PATH, 200, "ok"),
        ("r-2", "unmatched", 404, "route_not_found"),
        ("r-3", CHAT_PATH, 404, "not_found"),
    ]
    assert lines[0]["bytes_out"] == len(
        b'{"content":"Hello from the stub.","stop_reason":"finished_ok","tool_calls":[]}'
    )
    assert lines[0]["bytes_in"] > 0
    assert lines[0]["duration_ms"] >= 0
    assert [line["method"] for line in lines] == ["POST", "other", "POST"]
    assert "canary" not in json.dumps(lines).lower()


async def test_log_line_keeps_to_one_line_whatever_is_logged() -> None:
    """A line break in a message would let a client forge a line."""
    record = logging.LogRecord("llama_stack.server", logging.ERROR, "", 0, 'first\n{"level":"info"}', None, None)
    assert len(JsonFormatter().format(record).splitlines()) == 1


async def test_wrong_log_call_does_not_fail_where_it_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    """As with every handler of the standard library: a provider's slip in a message must not end its request."""
    writer = LineWriter(io.StringIO())
    writer.handle(logging.LogRecord("llama_stack.x", logging.ERROR, "", 0, "%d", ("x",), None))
    writer.close()
    assert "--- Logging error ---" in capsys.readouterr().err


async def test_last_lines_are_written_though_stderr_is_slow() -> None:
    """Why a process ended is said in its last lines."""
    writing, may_go_on = threading.Event(), threading.Event()

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            writing.set()
            may_go_on.wait()
            return super().write(text)

    stream = Slow()
    writer = LineWriter(stream)
    writer.handle(logging.LogRecord("llama_stack.x", logging.ERROR, "", 0, "first", None, None))
    await asyncio.to_thread(writing.wait)
    writer.handle(logging.LogRecord("llama_stack.x", logging.ERROR, "", 0, "last", None, None))
    closing = asyncio.create_task(asyncio.to_thread(writer.close))
    await asyncio.sleep(0.05)
    may_go_on.set()
    await closing
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["first", "last"]


async def test_app_can_be_made_before_the_stack_starts() -> None:
    """Liveness and readiness answer while providers load."""
    stack, _ = stub_stack()
    async with client_of(stack) as client:
        assert problem_of(await client.post(CHAT_PATH, json=CHAT))["error"]["code"] == "not_ready"
        async with running(stack):
            assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 200

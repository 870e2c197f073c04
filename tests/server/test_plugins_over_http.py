"""Faces and middlewares: what plugins bring to the server, under the same rules as the contracts' own routes."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.types import ASGIApp, Receive, Scope, Send

from llama_stack.apis import Config, Inference, NoConfig
from llama_stack.distribution import Distribution
from llama_stack.errors import EngineRestartedError, ModelNotFoundError
from llama_stack.plugins import FaceSpec, MiddlewareSpec, discover, hookimpl
from llama_stack.registry import Registry
from llama_stack.server import listening
from llama_stack.stack import Stack, running
from llama_stack.testing.stub_inference import StubPlugin
from tests.server.serving import CHAT, CHAT_PATH, Serving, check_problem, problem_of, serving

pytestmark = pytest.mark.anyio


class Tag(Config):
    tag: str
    paths: tuple[str, ...] = Field(default=(), strict=True)


class Plugin:
    """A face with one route of every temper, and a middleware that leaves its mark."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()
        self.entered = asyncio.Event()

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1")

        @router.get("/echo/{text}")
        async def echo(text: str, times: int = 1) -> str:
            return text * times

        @router.get("/missing")
        async def missing() -> str:
            raise ModelNotFoundError("gpt", ["stub"])

        @router.get("/teapot")
        async def teapot() -> str:
            raise HTTPException(418, "short and stout")

        @router.get("/broken")
        async def broken() -> str:
            raise OSError("canary")

        @router.get("/lost/{text}")
        async def lost(text: str) -> str:
            raise HTTPException(404, f"there is no thread {text}")

        @router.get("/busy")
        async def busy() -> str:
            raise HTTPException(429, "not so fast", headers={"Retry-After": "7"})

        @router.post("/sum")
        async def total(body: dict[str, float]) -> float:
            return sum(body.values())

        @router.post("/size")
        async def size(request: Request) -> int:
            return len(await request.body())

        @router.get("/late")
        async def late(request: Request) -> int:
            await asyncio.sleep(0.05)  # by now the client is watched for its leaving
            return len(await request.body())

        @router.post("/slow")
        async def slow(body: dict[str, Any]) -> str:
            self.entered.set()
            try:
                await asyncio.sleep(600)
            finally:
                self.cancelled.set()
            return ""

        @router.post("/idle")
        async def idle() -> str:
            return await slow({})

        @router.get("/stream")
        async def stream() -> StreamingResponse:
            async def pieces() -> AsyncIterator[bytes]:
                yield b"one"
                raise OSError("canary")

            return StreamingResponse(pieces())

        return router

    @hookimpl
    def llama_stack_faces(self) -> list[FaceSpec]:
        @asynccontextmanager
        async def start(config: NoConfig, inference: Inference) -> AsyncIterator[APIRouter]:
            yield self.router()

        return [FaceSpec(name="sample", start=start)]

    @hookimpl
    def llama_stack_middleware(self) -> list[MiddlewareSpec]:
        def wrap(app: ASGIApp, config: Tag) -> ASGIApp:
            async def tagged(scope: Scope, receive: Receive, send: Send) -> None:
                async def add(message: Any) -> None:
                    if message["type"] == "http.response.start":
                        message["headers"] = [*message["headers"], (b"x-tag", config.tag.encode())]
                    await send(message)

                await app(scope, receive, add)

            return tagged

        def wrap_whole(app: ASGIApp, config: NoConfig) -> ASGIApp:
            async def whole(scope: Scope, receive: Receive, send: Send) -> None:
                held: list[Any] = []

                async def hold(message: Any) -> None:
                    held.append(message)

                await app(scope, receive, hold)
                for message in held:
                    await send(message)

            return whole

        async def passed_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
            return await call_next(request)

        def wrap_in_a_task(app: ASGIApp, config: NoConfig) -> ASGIApp:
            return BaseHTTPMiddleware(app, passed_on)

        return [
            MiddlewareSpec(name="task", wrap=wrap_in_a_task, config=NoConfig),
            MiddlewareSpec(name="tag", wrap=wrap, config=Tag),
            MiddlewareSpec(name="whole", wrap=wrap_whole, config=NoConfig),
        ]


@asynccontextmanager
async def with_plugin(*, inmost: str | None = None, **limits: float) -> AsyncIterator[tuple[Plugin, Serving]]:
    plugin, stub = Plugin(), StubPlugin()
    distribution = Distribution.model_validate(
        {
            "version": 1,
            "name": "faced",
            "providers": {"inference": [{"provider": "stub"}]},
            "faces": [{"face": "sample"}],
            "middleware": [
                {"middleware": "tag", "config": {"tag": "outer", "paths": ["/v1"]}},
                {"middleware": "tag", "config": {"tag": "inner"}},
                *([{"middleware": inmost}] if inmost else []),
            ],
            "server": {"port": 0, "limits": limits},
        }
    )
    stack = Stack(distribution, Registry(discover(extra=[plugin, stub])))
    async with (
        running(stack),
        listening(stack) as listener,
        httpx2.AsyncClient(base_url=listener.url, trust_env=False) as client,
    ):
        served = Serving(listener, stub.started[-1], client)
        try:
            yield plugin, served
        finally:
            for raw in served.opened:
                raw.abort()


async def test_face_is_served_with_the_headers_of_all_replies() -> None:
    """A face is a guest under the same roof."""
    async with with_plugin() as (_, served):
        response = await served.client.get("/v1/echo/ab?times=2")
        assert response.json() == "abab"
        assert response.headers["x-request-id"]
        assert response.headers["cache-control"] == "no-store"
        metrics = (await served.client.get("/metrics")).text
        assert 'route="/v1/echo/{text}",status="200"' in metrics


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/echo/ab?times=x", 422, "validation"),
        ("/v1/missing", 404, "model_not_found"),
        ("/v1/teapot", 418, "bad_request"),
        ("/v1/lost/x", 404, "not_found"),
        ("/v1/busy", 429, "rate_limited"),
        ("/v1/broken", 500, "internal"),
        ("/v1/nowhere", 404, "route_not_found"),
    ],
)
async def test_errors_of_faces_have_the_one_shape(path: str, status: int, code: str) -> None:
    """Whatever raises them: our errors, the framework's, its validation, or a bug."""
    async with with_plugin() as (_, served):
        response = await served.client.get(path)
        document = problem_of(response)
        assert (document["status"], document["error"]["code"]) == (status, code)
        assert "canary" not in response.text
        assert f'code="{code}"' in (await served.client.get("/metrics")).text


async def test_what_a_face_says_of_its_error_is_passed_on() -> None:
    """Its own words, and the headers that tell a client what to do; a fault of a parameter is marked as one."""
    async with with_plugin() as (_, served):
        assert problem_of(await served.client.get("/v1/lost/x"))["detail"] == "there is no thread x"
        assert (await served.client.get("/v1/busy")).headers["retry-after"] == "7"
        document = problem_of(await served.client.get("/v1/echo/ab?times=x"))
        assert (document["errors"][0]["pointer"], document["error"]["param"]) == ("?times", "times")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"a":NaN}', 400, "malformed_json"),
        (b'{"a":1,"a":2}', 400, "malformed_json"),
        (b'{"a":"\\ud800"}', 400, "malformed_json"),
        (b"{bad", 400, "malformed_json"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, 400, "nesting_too_deep"),
        (b'{"a":' * 10_000, 400, "nesting_too_deep"),
        (b"[" + b"1," * 30_000 + b"1]", 413, "too_large"),
        (b'{"a":"' + b"x" * 70_000 + b'"}', 413, "too_large"),
        (b'{"a":"x"}', 422, "validation"),
    ],
    ids=lambda value: repr(value)[:24],
)
async def test_bodies_of_faces_pass_the_same_gate(body: bytes, status: int, code: str) -> None:
    """The limits are the server's, whoever declares the route; middlewares see the refusal as clients do."""
    async with with_plugin(max_body_bytes=65_536, max_json_nodes=1_000) as (_, served):
        response = await served.client.post("/v1/sum", content=body, headers={"content-type": "application/json"})
        document = problem_of(response)
        assert (document["status"], document["error"]["code"]) == (status, code)
        assert response.headers.get_list("x-tag") == ["inner", "outer"]
        response = await served.client.post("/v1/sum", json={"a": 1, "b": 2})
        assert response.json() == 3


@pytest.mark.parametrize("framing", [b"content-length: 70000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"])
async def test_body_that_a_face_reads_is_limited_in_size(framing: bytes) -> None:
    """Also one that is not JSON, and whether its length is declared or not."""
    async with with_plugin(max_body_bytes=65_536) as (_, served):
        client = await served.connect()
        await client.send(b"POST /v1/size HTTP/1.1\r\nhost: localhost\r\n" + framing)
        await client.send(b"11170\r\n" + b"x" * 70_000 + b"\r\n0\r\n\r\n")
        assert (await client.response())[0] == 413
        assert (await served.client.post("/v1/size", content=b"x" * 65_536)).json() == 65_536


async def test_body_that_a_face_waits_for_is_limited_in_time() -> None:
    """A client that never sends it would hold the connection for ever."""
    async with with_plugin(body_timeout_seconds=0.2) as (_, served):
        client = await served.connect()
        await client.send(b"POST /v1/size HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n\r\nab")
        assert (await client.response())[0] == 408


@pytest.mark.parametrize("headers", [{}, {"content-length": "0"}])
async def test_face_may_ask_late_whether_there_is_a_body(headers: dict[str, str]) -> None:
    """Watching for a client that leaves must not take what the face has not read yet."""
    async with with_plugin() as (_, served):
        assert (await served.client.get("/v1/late", headers=headers, timeout=5)).json() == 0


async def test_wrong_method_on_a_face_names_the_right_one() -> None:
    """RFC 9110 section 15.5.6."""
    async with with_plugin() as (_, served):
        response = await served.client.post("/v1/echo/ab")
        assert problem_of(response)["error"]["code"] == "method_not_allowed"
        assert response.headers["allow"] == "GET"


@pytest.mark.parametrize("request_line", ["POST /v1/slow", "POST /v1/idle"])
async def test_client_that_leaves_a_face_stops_its_work(request_line: str) -> None:
    """The promise holds for all routes, not for ours alone, and for a body that nobody reads as it is empty."""
    async with with_plugin() as (plugin, served):
        client = await served.connect()
        await client.send(f"{request_line} HTTP/1.1\r\nhost: localhost\r\n".encode())
        if "slow" in request_line:
            await client.send(b"content-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
        else:
            await client.send(b"content-length: 0\r\n\r\n")
        await plugin.entered.wait()
        client.abort()
        async with asyncio.timeout(10):
            await plugin.cancelled.wait()


async def test_stream_of_a_face_that_breaks_is_cut() -> None:
    """A face has its own forms; what is not ended well must not look as if it were."""
    async with with_plugin() as (_, served):
        with pytest.raises(httpx2.RemoteProtocolError):
            await served.client.get("/v1/stream")
        assert (
            'code="internal",method="GET",route="/v1/stream",status="200"' in (await served.client.get("/metrics")).text
        )


async def test_middlewares_wrap_every_route_in_their_order() -> None:
    """The first of the list is the outermost, so its mark comes last."""
    async with with_plugin() as (_, served):
        for path in ("/v1/echo/a", "/v1/missing", "/version", "/models/list", "/nowhere"):
            response = await served.client.get(path)
            assert [value for name, value in response.headers.multi_items() if name == "x-tag"] == ["inner", "outer"]
            assert len([name for name, _ in response.headers.multi_items() if name == "x-request-id"]) == 1
        response = await served.client.post("/inference/chat_completion", json={})
        assert (problem_of(response)["status"], response.headers.get_list("x-tag")) == (422, ["inner", "outer"])


async def test_interruption_reaches_work_that_a_middleware_runs_in_a_task_of_its_own() -> None:
    """As Starlette's own base class does: a deadline is still an event or a 504, and who leaves is noticed."""
    async with with_plugin(inmost="task") as (_, served):
        served.stub.permits = asyncio.Semaphore(2)
        headers = {"x-deadline-ms": "200"}
        response = await served.client.post(CHAT_PATH, json={**CHAT, "stream": True}, headers=headers)
        check_problem(json.loads(response.text.partition("event: error\ndata: ")[2]), 504)
        response = await served.client.post(CHAT_PATH, json=CHAT, headers=headers)
        assert (problem_of(response)["status"], response.headers.get_list("x-tag")) == (504, ["inner", "outer"])
        served.stub.permits, served.stub.failure = None, SystemExit(3)  # which would end the event loop from there
        assert problem_of(await served.client.post(CHAT_PATH, json=CHAT))["status"] == 500
        served.stub.permits, served.stub.failure = asyncio.Semaphore(0), None
        for body in (CHAT, {**CHAT, "stream": True}):
            stopped, running = served.stub.stopped, served.listener.app.traffic
            client = await served.connect()
            await client.post(CHAT_PATH, body)
            while not running.running:
                await asyncio.sleep(0)
            client.abort()
            await served.stub.until(stopped=stopped + 1)
            while running.running:
                await asyncio.sleep(0)
        metrics = (await served.client.get("/metrics")).text
        assert f'code="client_gone",method="POST",route="{CHAT_PATH}",status="499"}} 2.0' in metrics


@pytest.mark.parametrize("path", ["/v1/size", "/v1/sum"])
async def test_client_that_leaves_in_the_middle_of_its_body_is_no_failure(path: str) -> None:
    """Nobody is left to be told, and nothing was wrong on our side."""
    async with with_plugin() as (_, served):
        client = await served.connect()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{{"
        )
        await client.send(head.encode())
        while not served.listener.app.traffic.running:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        client.abort()
        while served.listener.app.traffic.running:
            await asyncio.sleep(0)
        assert f'code="client_gone",method="POST",route="{path}"' in (await served.client.get("/metrics")).text


async def test_list_that_fails_behind_a_middleware_that_holds_it_back_is_one_problem() -> None:
    """The middleware has the status of a success in hand; a second one sent through it would make a mixture of both."""
    async with with_plugin(inmost="whole") as (_, served):
        served.stub.permits = asyncio.Semaphore(4)
        body = {"model": "stub", "batch_dialogs": [CHAT["dialog"]] * 2}
        posting = asyncio.create_task(served.client.post("/inference/batch_chat_completion", json=body))
        await served.stub.until(steps=4)
        served.stub.failure = EngineRestartedError("the engine restarts")
        served.stub.permits.release()
        assert problem_of(await posting)["error"]["code"] == "engine_restarted"


async def test_faces_are_in_the_document_of_extensions() -> None:
    """Clients of a face need its document as well."""
    async with with_plugin() as (_, served):
        assert "/v1/echo/{text}" in (await served.client.get("/openapi-ext.json")).json()["paths"]
        assert "/v1/echo/{text}" not in (await served.client.get("/openapi.json")).json()["paths"]


async def test_small_writes_are_not_held_back() -> None:
    """asyncio turns Nagle's algorithm off only for sockets made for TCP by name; with it a token waits for 40 ms."""
    async with serving() as served:
        await served.client.get("/health/live")
        for connection in served.listener.connections:
            found = connection.transport.get_extra_info("socket")
            assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

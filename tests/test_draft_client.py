"""A client that knows the draft and nothing else: what it may send is taken, and every reply is valid by the draft."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest

from llama_stack.server.openapi import draft_document
from tests.draft_schemas import DraftSchemas
from tests.server.serving import serving
from tests.started import started

pytestmark = pytest.mark.anyio

SAMPLING = {"temperature": 0.0, "strategy": "greedy", "top_p": 0.95, "top_k": 0}
COMMON = {"sampling_params": SAMPLING, "max_tokens": 12, "logprobs": False}
TOOL = {
    "tool_name": "web_search",
    "parameters": {"query": {"type": "string"}},
    "input_shields": [],
    "output_shields": [{"shield_type": "llama_guard", "params": {}}],
}
CALL = {"tool_name": "web_search", "arguments": {"query": "Oslo", "pages": 1, "fresh": None}}


def message(role: str, content: Any, **parts: Any) -> dict[str, Any]:
    return {"role": role, "content": content, "tool_calls": [], "tool_responses": []} | parts


DIALOGS = [
    {"message": message("user", "Hello!"), "message_history": []},
    {
        "message": message("tool", "", tool_responses=[{"tool_name": "web_search", "content": "Oslo is a city."}]),
        "message_history": [
            message("system", "Be brief."),
            message("user", ["What is", " Oslo?"]),
            message("assistant", "", tool_calls=[CALL]),
        ],
    },
]


class DraftClient:
    """Sends what the draft allows, and reads replies as the draft describes them."""

    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http
        self._judge = DraftSchemas()

    async def whole(self, path: str, body: dict[str, Any]) -> Any:
        """One JSON value."""
        response = await self._post(path, body)
        assert response.headers["content-type"] == "application/json"
        value = response.json()
        self._judge.check_reply(f"POST {path}", value)
        return value

    async def lines(self, path: str, body: dict[str, Any], accept: str | None = None) -> list[Any]:
        """One value a line, or an array for a client that accepts nothing else."""
        response = await self._post(path, body, accept)
        if accept == "application/json":
            assert response.headers["content-type"] == "application/json"
            values = response.json()
        else:
            assert response.headers["content-type"] == "application/jsonl"
            assert response.text.endswith("\n")
            values = [json.loads(line) for line in response.text.splitlines()]
        for value in values:
            self._judge.check_reply(f"POST {path}", value)
        return list(values)

    async def chunks(self, path: str, body: dict[str, Any], accept: str | None = None) -> list[Any]:
        """The chunks of a streamed reply, from events or from lines."""
        response = await self._post(path, body | {"stream": True}, accept)
        if accept == "application/jsonl":
            assert response.headers["content-type"] == "application/jsonl"
            values = [json.loads(line) for line in response.text.splitlines()]
        else:
            assert response.headers["content-type"] == "text/event-stream"
            events = response.text.split("\n\n")
            assert events.pop() == ""
            assert all(event.startswith("data: ") and "\n" not in event for event in events)
            values = [json.loads(event.removeprefix("data: ")) for event in events]
        for value in values:
            self._judge.check_reply(f"POST {path}", value, chunk=True)
        return values

    async def _post(self, path: str, body: dict[str, Any], accept: str | None = None) -> httpx2.Response:
        self._judge.check_request(f"POST {path}", body)
        response = await self._http.post(path, json=body, headers={"accept": accept} if accept else {})
        assert response.status_code == 200, response.text
        return response


@pytest.fixture(scope="module")
def tiny_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with started("tiny", tmp_path_factory.mktemp("home")) as address:
        yield address


@pytest.fixture(params=["scripted", "tiny"])
async def http(request: pytest.FixtureRequest) -> AsyncIterator[httpx2.AsyncClient]:
    """A server with scripted inference, and one with a Llama behind it."""
    if request.param == "scripted":
        async with serving() as served:
            yield served.client
    else:
        address = request.getfixturevalue("tiny_address")
        async with httpx2.AsyncClient(base_url=address, trust_env=False, timeout=60) as client:
            yield client


def check_stream(chunks: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    """The stream tells the whole reply, and its last chunk alone says why it ended."""
    assert len(chunks) > 1
    assert [chunk.get("stop_reason", "not_stopped") for chunk in chunks[:-1]] == ["not_stopped"] * (len(chunks) - 1)
    assert chunks[-1]["stop_reason"] == whole["stop_reason"]
    assert "".join(chunk["text_delta"] for chunk in chunks) == whole["content"]
    assert [chunk["tool_call"] for chunk in chunks if "tool_call" in chunk] == whole.get("tool_calls", [])


async def test_completions_are_the_drafts_plain_and_streamed(http: httpx2.AsyncClient) -> None:
    """The oldest clients know only this."""
    client = DraftClient(http)
    body = {"content": "Once upon a time", "model": "llama3_8b", "stream": False} | COMMON
    whole = await client.whole("/inference/completion", body)
    assert set(whole) == {"content", "stop_reason"}
    check_stream(await client.chunks("/inference/completion", body), whole)
    check_stream(await client.chunks("/inference/completion", body, "application/jsonl"), whole)
    told = await client.whole("/inference/completion", body | {"logprobs": True, "content": ["Once", " upon"]})
    assert told["content"]


async def test_chat_completions_are_the_drafts_plain_and_streamed(http: httpx2.AsyncClient) -> None:
    """With history, tools and what they answered; a client of the draft sends every field that it requires."""
    client = DraftClient(http)
    for dialog in DIALOGS:
        body = {"model": "llama3_8b_chat", "dialog": dialog, "available_tools": [TOOL], "stream": False} | COMMON
        whole = await client.whole("/inference/chat_completion", body)
        assert set(whole) == {"content", "stop_reason", "tool_calls"}
        check_stream(await client.chunks("/inference/chat_completion", body), whole)
        check_stream(await client.chunks("/inference/chat_completion", body, "application/jsonl"), whole)
        await client.whole("/inference/chat_completion", body | {"logprobs": True})


async def test_batches_are_the_drafts_lines(http: httpx2.AsyncClient) -> None:
    """In the order of the request, and each as it would be alone."""
    client = DraftClient(http)
    batch = {"model": "llama3_8b", "content_batch": ["Once", "One, two", ["Hello ", "world"]]} | COMMON
    lines = await client.lines("/inference/batch_completion", batch)
    assert len(lines) == 3
    assert await client.lines("/inference/batch_completion", batch, "application/json") == lines
    assert await client.lines("/inference/batch_completion", batch | {"content_batch": []}, "application/json") == []
    chat = {"model": "llama3_8b_chat", "batch_dialogs": DIALOGS, "available_tools": [TOOL]} | COMMON
    lines = await client.lines("/inference/batch_chat_completion", chat)
    assert len(lines) == 2
    assert await client.lines("/inference/batch_chat_completion", chat, "application/json") == lines


async def test_the_served_document_is_the_drafts(http: httpx2.AsyncClient) -> None:
    """What a client is generated from is what the tests hold to the draft's own file."""
    assert (await http.get("/openapi.json")).json() == draft_document()

"""Every operation of every contract, over the wire and back: by the client, by a remote provider, against the draft.

Nothing here names an operation. Requests, replies and the providers behind them are made from the contracts, so a new
operation is held to all of this on the day it is written.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from pydantic.fields import FieldInfo

from llama_stack.apis import APIS, Api, Models, Operation, Shape, operations
from llama_stack.apis.common import Schema
from llama_stack.client import AsyncClient
from llama_stack.distribution import Distribution
from llama_stack.plugins import ProviderSpec, discover, hookimpl
from llama_stack.registry import Registry
from llama_stack.server import listening
from llama_stack.stack import Stack, running
from llama_stack.testing import arguments, sample, scripted
from tests.draft_schemas import DraftSchemas

pytestmark = pytest.mark.anyio

PROVIDED = [api for api in APIS if api is not Models]
FORMS = [
    (operation, streams)
    for api in PROVIDED
    for operation in operations(api)
    for streams in ([False, True] if operation.shape is Shape.REPLY else [False])
]
"""Every operation, those that can stream in both ways."""
DRAFT_FORMS = [(operation, streams) for operation, streams in FORMS if not operation.is_extension]


def _name(value: Operation | bool) -> str:
    return value.key if isinstance(value, Operation) else ("stream" if value else "whole")


def _start_of(api: type[Api]) -> Callable[[], AbstractAsyncContextManager[Api]]:
    async def start() -> AsyncIterator[Api]:
        yield scripted(api)()

    start.__annotations__["return"] = AsyncIterator[api]  # type: ignore[valid-type]
    return asynccontextmanager(start)


@hookimpl
def llama_stack_providers() -> Iterator[ProviderSpec]:
    """A scripted provider of every API."""
    for api in PROVIDED:
        yield ProviderSpec(api=api, name="scripted", start=_start_of(api))


@asynccontextmanager
async def serving(folder: Path, provider: str, **config: str) -> AsyncIterator[str]:
    """The address of a server whose every API has this provider."""
    entries = {api.name: [{"provider": provider, "config": config}] for api in PROVIDED}
    distribution = Distribution.model_validate(
        {"version": 1, "name": "conformance", "providers": entries, "server": {"port": 0}}
    )
    plugin = SimpleNamespace(llama_stack_providers=llama_stack_providers)
    stack = Stack(distribution, Registry(discover([plugin])), state_folder=folder)
    async with running(stack), listening(stack) as listener:
        yield listener.url


def given(operation: Operation, streams: bool, *, is_full: bool) -> dict[str, Any]:
    """Arguments that ask for the whole reply or for the stream."""
    found = arguments(operation, is_full=is_full)
    if streams and operation.stream_parameter:
        return found | {operation.stream_parameter: True}
    if streams:
        assert operation.body is not None
        body = found[operation.body.name]
        return found | {operation.body.name: body.model_copy(update={"stream": True})}
    return found


def expected(operation: Operation, streams: bool) -> Any:
    """What the scripted provider answers."""
    if streams:
        return [sample(operation.chunk), sample(operation.chunk, is_full=True)]
    if operation.shape is Shape.LINES:
        return [sample(operation.result, is_full=True), sample(operation.result)]
    return None if operation.shape is Shape.VOID else sample(operation.result, is_full=True)


async def called(client: AsyncClient, operation: Operation, streams: bool, *, is_full: bool) -> Any:
    """The answer to a call, an iterator read to its end."""
    answer = await getattr(client.api(operation.api), operation.name)(**given(operation, streams, is_full=is_full))
    return [item async for item in answer] if isinstance(answer, AsyncIterator) else answer


@pytest.mark.parametrize(("operation", "streams"), FORMS, ids=_name)
@pytest.mark.parametrize("is_full", [False, True], ids=["required", "full"])
async def test_a_call_comes_back_as_the_provider_answered(
    operation: Operation, streams: bool, is_full: bool, tmp_path: Path
) -> None:
    """Request, route, provider, reply and client read one contract, so nothing may be lost between them."""
    async with serving(tmp_path, "scripted") as url, AsyncClient(url) as client:
        assert await called(client, operation, streams, is_full=is_full) == expected(operation, streams)


@pytest.mark.parametrize(("operation", "streams"), FORMS, ids=_name)
async def test_a_remote_provider_answers_as_the_far_one(operation: Operation, streams: bool, tmp_path: Path) -> None:
    """One machine becomes several by a URL in the YAML; the client must not be able to tell."""
    async with (
        serving(tmp_path / "far", "scripted") as far,
        serving(tmp_path / "near", "remote", url=far) as near,
        AsyncClient(near) as client,
    ):
        assert await called(client, operation, streams, is_full=True) == expected(operation, streams)


@pytest.mark.parametrize(("operation", "streams"), DRAFT_FORMS, ids=_name)
async def test_a_draft_client_gets_replies_that_the_draft_allows(
    operation: Operation, streams: bool, tmp_path: Path
) -> None:
    """A client generated from the draft sends only what the draft knows, and rejects what it does not know."""
    draft = DraftSchemas()
    found = given(operation, streams, is_full=True)
    query = {name: str(found[name]) for name in operation.query if operation.query[name].is_required}
    body = None
    if operation.body is not None:
        body = _as_the_draft_asks(operation, found[operation.body.name])
        draft.check_request(operation.key, body)
    follows = {"accept": "text/event-stream"} if operation.stream_parameter and streams else {}
    async with serving(tmp_path, "scripted") as url, httpx2.AsyncClient(base_url=url, trust_env=False) as client:
        reply = await client.request(operation.method, operation.path, params=query, json=body, headers=follows)
    assert reply.status_code == 200, reply.text
    if operation.shape is Shape.VOID:
        assert reply.content == b""
        assert "content-type" not in reply.headers
        return
    is_chunk = streams and operation.stream_parameter is None  # the draft's log has one form, whole or followed
    for value in _values(reply):
        draft.check_reply(operation.key, value, chunk=is_chunk)


def _as_the_draft_asks(operation: Operation, value: Any) -> Any:
    """The value as JSON without our extensions, and with the draft's own names of models and shields."""
    if isinstance(value, Schema):
        extensions = {name for name, field in type(value).model_fields.items() if _is_extension(field)}
        dumped = value.model_dump(mode="json")
        return {
            name: _draft_word(operation, name)
            if name in ("model", "shield_type")
            else _as_the_draft_asks(operation, getattr(value, name))
            if isinstance(getattr(value, name), Schema | list)
            else dumped[name]
            for name in dumped.keys() - extensions
            if dumped[name] is not None
        }
    return [_as_the_draft_asks(operation, item) for item in value] if isinstance(value, list) else value


def _is_extension(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("x-extension"))


def _draft_word(operation: Operation, key: str) -> str:
    if key == "shield_type":
        return "llama_guard"
    if operation.api.name == "reward_scoring":
        return "llama3_405b_reward"
    return "llama3_8b_chat" if "chat" in operation.path or "agentic" in operation.path else "llama3_8b"


def _values(reply: httpx2.Response) -> list[Any]:
    kind = reply.headers["content-type"].partition(";")[0]
    if kind == "application/jsonl":
        return [json.loads(line) for line in reply.text.splitlines()]
    if kind == "text/event-stream":
        return [json.loads(line.removeprefix("data: ")) for line in reply.text.splitlines() if line]
    assert kind == "application/json"
    return [reply.json()]

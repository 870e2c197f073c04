"""Every way by which a URL that a client, a model or another server chose reaches the stack: none leads inside.

The contracts say where a client may put a URL; the list below is held equal to them, so that a field that is added
fails here until it is known what follows it. What the stack does with it is looked at from outside, as attempts to
connect, with every host allowed that an operator can allow.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest
from llama_stack_agents.tools.image_gen import ImageGenConfig, image_gen
from llama_stack_agents.tools.mcp import McpConfig, connected
from llama_stack_agents.tools.web_search import WebSearchConfig, started
from pydantic import BaseModel, ValidationError

from llama_stack.apis import APIS, operations
from llama_stack.apis.common import URL, Attachment, Message
from llama_stack.client import AsyncClient
from llama_stack.distribution import load_distribution
from llama_stack.errors import ProviderStartError, StackError
from llama_stack.fetch import FetchConfig, Fetcher, is_public
from llama_stack.registry import Registry
from llama_stack.server import create_app
from llama_stack.stack import Stack, running
from llama_stack.testing.network import (
    HOSTILE_SERVERS,
    HOSTILE_URLS,
    PUBLIC,
    HostileServer,
    StagedNetwork,
    answering,
    redirect,
    serving,
)
from llama_stack.testing.web_services import image_model, searxng
from tests.providers.agents.stage import Stage, stage
from tests.test_fetch import tls, trusting

pytestmark = pytest.mark.anyio

DIALOG = "dialog.message", "dialog.message_history"
PARTS = "content.url", "tool_responses.content.url"
URL_FIELDS: dict[str, set[str]] = {
    "POST /inference/completion": {"content.url"},
    "POST /inference/chat_completion": {f"{place}.{part}" for place in DIALOG for part in PARTS},
    "POST /inference/batch_completion": {"content_batch.url"},
    "POST /inference/batch_chat_completion": {
        f"batch_{place}.{part}".replace("dialog.", "dialogs.") for place in DIALOG for part in PARTS
    },
    "POST /safety/run_shield": {"messages.content.url", "messages.tool_responses.content.url"},
    "POST /agentic_system/execute": {
        "messages.content.url",
        "messages.tool_responses.content.url",
        "turn_history.user_messages.content.url",
        "turn_history.user_messages.tool_responses.content.url",
        "turn_history.response_message.content.url",
        "turn_history.response_message.tool_responses.content.url",
        "turn_history.steps.tool_responses.content.url",
    },
    "POST /datasets/create": {"dataset.content_url"},
    "POST /datasets/read": {"dataset.content_url"},
    "POST /datasets/hold": {"dataset.content_url"},
    "POST /post_training/train_reward_model": {"dataset.content_url", "validation_dataset.content_url"},
    "POST /post_training/supervised_fine_tune/": {"dataset.content_url", "validation_dataset.content_url"},
    "POST /post_training/preference_optimize/": {
        "dataset.content_url",
        "validation_dataset.content_url",
        "finetuned_model",
    },
    "POST /reward_scoring/score": {
        *(f"prompt_generations.{place}.{part}" for place in DIALOG for part in PARTS),
        "prompt_generations.k_generations.content.url",
        "prompt_generations.k_generations.tool_responses.content.url",
    },
    "POST /synthetic_data_generation/generate": {"prompts.content.url", "prompts.tool_responses.content.url"},
}
"""Where a client may put a URL. What is not in ``bodies`` below at each of these places has not been tried."""


def bodies(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Requests that carry a URL at each of those places, as a client sends them."""
    picture = {"url": url, "mime_type": "text/plain"}
    user = {"role": "user", "content": picture}
    tool = {"role": "tool", "content": "", "tool_responses": [{"tool_name": "math", "content": picture}]}
    plain = {"role": "user", "content": "Hi"}
    said = {"role": "assistant", "content": picture, "tool_responses": tool["tool_responses"]}
    dialogs = [
        {"message": user, "message_history": []},
        {"message": tool, "message_history": []},
        {"message": plain, "message_history": [user, said, tool]},
    ]
    yield "/inference/completion", {"model": "llama3_8b", "content": picture}
    yield "/inference/batch_completion", {"model": "llama3_8b", "content_batch": ["Hi", picture]}
    for dialog in dialogs:
        yield "/inference/chat_completion", {"model": "llama3_8b_chat", "dialog": dialog}
    yield "/inference/batch_chat_completion", {"model": "llama3_8b_chat", "batch_dialogs": dialogs}
    for shield in ("llama_guard", "prompt_guard", "code_guard"):
        yield "/safety/run_shield", {"messages": [user, tool], "shield": {"shield_type": shield, "params": {}}}
    step = {"step_type": "tool_execution", "uuid": "s", "tool_calls": [], "tool_responses": tool["tool_responses"]}
    turn = {"user_messages": [user, tool], "steps": [step], "response_message": said}
    for messages, history in (([user], []), ([tool], []), ([plain], [turn])):
        for stream in (False, True):
            asked = {"agent_uuid": "a", "messages": messages, "turn_history": history, "stream": stream}
            yield "/agentic_system/execute", asked
    dataset = {"columns": {"dialog": "dialog"}, "content_url": url, "metadata": {}}
    yield "/datasets/create", {"uuid": "d", "dataset": dataset}
    yield "/datasets/read", {"dataset": dataset}
    yield "/datasets/hold", {"user": "u", "dataset": dataset}
    training = {
        "job_uuid": "j", "dataset": dataset, "validation_dataset": dataset, "hyperparam_search_config": {},
        "logger_config": {},
        "optimizer_config": {"optimizer_type": "adam", "lr": 0.1, "lr_min": 0.0, "weight_decay": 0.0},
        "training_config": {
            "n_epochs": 1, "batch_size": 1, "shuffle": False, "n_iters": 1, "enable_activation_checkpointing": False,
            "memory_efficient_fsdp_wrap": False, "fsdp_cpu_offload": False,
        },
    }  # fmt: skip
    lora = {"lora_attn_modules": [], "apply_lora_to_mlp": False, "apply_lora_to_output": False, "rank": 1, "alpha": 1}
    tuned = {"model": "llama3_8b", "algorithm": "lora", "algorithm_config": lora}
    yield "/post_training/supervised_fine_tune/", training | tuned
    yield "/post_training/train_reward_model", training | tuned
    dpo = {"reward_scale": 1.0, "reward_clip": 0.0, "epsilon": 0.1, "gamma": 0.0}
    aligned = {"finetuned_model": url, "algorithm": "dpo", "algorithm_config": dpo}
    yield "/post_training/preference_optimize/", training | aligned
    prompts = [{"dialog": dialog, "k_generations": [said, tool]} for dialog in dialogs]
    yield "/reward_scoring/score", {"model": "llama3_405b_reward", "prompt_generations": prompts}
    yield "/synthetic_data_generation/generate", {"prompts": [user, tool], "filtering_function": "none"}


def url_fields(annotation: Any, path: str, seen: frozenset[type]) -> Iterator[str]:
    """The places of URLs below an annotation."""
    if annotation is URL:
        yield path
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation not in seen:
            for name, field in annotation.model_fields.items():
                yield from url_fields(field.annotation, f"{path}.{name}".lstrip("."), seen | {annotation})
    elif (value := getattr(annotation, "__value__", None)) is not None:
        yield from url_fields(value, path, seen)
    else:
        for each in get_args(annotation):
            yield from url_fields(each, path, seen)


def places_in(value: Any, url: str, path: str = "") -> Iterator[str]:
    """Where in a body a URL stands."""
    if value == url:
        yield path
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from places_in(each, url, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for each in value:
            yield from places_in(each, url, path)


def test_the_list_holds_every_field_of_the_contracts_that_takes_a_url() -> None:
    """A new one is a new way in: add it to the list, and to the bodies that are tried."""
    found: dict[str, set[str]] = {}
    for api in APIS:
        for operation in operations(api):
            parameters = [*operation.query.values(), *([operation.body] if operation.body else [])]
            places = {place for each in parameters for place in url_fields(each.annotation, "", frozenset())}
            found |= {operation.key: places} if places else {}
    assert found == URL_FIELDS
    bodies_of = {operation.key: operation.body for api in APIS for operation in operations(api)}
    tried: dict[str, set[str]] = {}
    for path, body in bodies("http://mark.example/"):
        parameter = bodies_of[f"POST {path}"]
        assert parameter is not None
        parameter.adapter.validate_json(json.dumps(body))  # it is not refused for anything but its URL
        tried.setdefault(f"POST {path}", set()).update(places_in(body, "http://mark.example/"))
    assert tried == URL_FIELDS


class Attempts:
    """The address of every attempt of this process to connect somewhere, while it watches."""

    def __init__(self) -> None:
        self.seen: list[str] | None = None

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.seen is not None and event == "socket.connect" and isinstance(arguments[1], tuple):
            self.seen.append(str(arguments[1][0]))


ATTEMPTS = Attempts()
sys.addaudithook(ATTEMPTS.hook)  # which cannot be taken back: it does nothing while nobody watches


async def test_no_request_with_a_url_makes_the_stack_connect_inside(tmp_path: Path) -> None:
    """All 42 at every place of every operation, over HTTP's own path, on the distribution that everybody runs first.

    Its agents may read from every public host.
    """
    distribution = load_distribution("tiny", environ={})
    (agents,) = distribution.providers["agentic_system"]
    config = {"fetch": {"hosts": ["*"], "timeout_seconds": 5, "max_bytes": 100_000}, "limits": {"tokens": 1}}
    opened = {"agentic_system": (agents.model_copy(update={"config": config}),), "memory_banks": ()}
    changed = distribution.model_copy(update={"providers": {**distribution.providers, **opened}})
    statuses: dict[str, set[int]] = {}
    async with running(Stack(changed, Registry(), state_folder=tmp_path)) as stack:
        transport = httpx2.ASGITransport(app=create_app(stack))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            lists = ("available_tools", "executable_tools", "memory_bank_uuids", "input_shields", "output_shields")
            agent: dict[str, Any] = {"uuid": "a", "instructions": "", "model": "llama3_8b_chat"}
            agent |= {name: [] for name in lists}
            assert (await client.post("/agentic_system/create", json=agent)).status_code == 200
            ATTEMPTS.seen = []
            try:
                for url in HOSTILE_URLS:
                    for path, body in bodies(url):
                        answer = await client.post(path, json=body)
                        statuses.setdefault(path, set()).add(answer.status_code)
                inside = [address for address in ATTEMPTS.seen if not is_public(address)]
            finally:
                ATTEMPTS.seen = None
    assert inside == []
    assert set().union(*statuses.values()) <= {200, 400, 404, 409, 422, 501, 502}
    assert 422 in statuses["/agentic_system/execute"]


Follow = Callable[[StagedNetwork, str], Awaitable[object]]


def attached(*, streamed: bool) -> Follow:
    """A text that a user attaches to a message."""

    async def follow(network: StagedNetwork, url: str) -> object:
        async with reading(network) as on:
            return await on.turn(Message.user(Attachment(url=url, mime_type="text/plain")), streamed=streamed)

    return follow


@asynccontextmanager
async def reading(network: StagedNetwork) -> AsyncIterator[Stage]:
    fetch = FetchConfig(hosts=("*",), timeout_seconds=0.3, max_bytes=100_000)
    async with stage(["Read."], fetcher=trusting(Fetcher(fetch, network=network))) as on:
        yield on


async def linked(network: StagedNetwork, url: str) -> object:
    """A picture that an image service links to."""
    async with serving(network, image_model(b"", url=url), address=SERVICE):
        network.names["service.example"] = [[SERVICE]]
        engine = {"kind": "openai", "url": "http://service.example", "model": "m", "response_format": "url",
                  "image_hosts": ["*"], "timeout_seconds": 0.3}  # fmt: skip
        tool = image_gen(ImageGenConfig.model_validate({"engine": engine, "max_bytes": 100_000}), network=network)
        return await tool.run({"prompt": "x"})


async def found(network: StagedNetwork, url: str) -> object:
    """What a search engine finds, which nobody opens."""
    async with serving(network, searxng(results=[("a", url, "b")]), address=SERVICE) as requests:
        network.names["service.example"] = [[SERVICE]]
        answer = await searched(network, "http://service.example")
        assert len(requests) == 1
        return answer


async def searched(network: StagedNetwork, url: str) -> object:
    """The answer of a search engine that the operator named."""
    engine = {"kind": "searxng", "url": url.rstrip("/")}
    config = WebSearchConfig.model_validate({"engine": engine, "timeout_seconds": 0.3})
    async with started(config, network=network) as tool:
        return await tool.run({"query": "x"})


async def drawn(network: StagedNetwork, url: str) -> object:
    """The answer of an image service that the operator named."""
    engine = {"kind": "openai", "url": url.rstrip("/"), "model": "m", "timeout_seconds": 0.3}
    tool = image_gen(ImageGenConfig.model_validate({"engine": engine, "max_bytes": 100_000}), network=network)
    return await tool.run({"prompt": "x"})


SERVICE = "93.184.216.35"
CHOSEN: dict[str, Follow] = {
    "an attachment": attached(streamed=False),
    "an attachment, streamed": attached(streamed=True),
    "a link to a picture": linked,
    "a result of a search": found,
}
"""Where somebody else than the operator chooses the URL."""
NAMED: dict[str, Follow] = {"a search engine": searched, "an image service": drawn}
"""Where the operator names a server, which may mean no good, or have been taken over."""
every_server = pytest.mark.parametrize("server", HOSTILE_SERVERS, ids=lambda server: server.name)


@pytest.mark.parametrize("way", CHOSEN)
async def test_no_url_leads_inside_by_any_way(way: str) -> None:
    """All 42. Nothing that was not public is connected, and what fails is told as one of our errors."""
    network = StagedNetwork()
    for url in HOSTILE_URLS:
        try:
            await CHOSEN[way](network, url)
        except ValidationError:
            assert not url.startswith(("http://", "https://", "data:", "file://"))  # the contract takes no other
        except StackError:
            continue
        else:
            assert way == "a result of a search", url
    assert network.honeypot == 0


@every_server
@pytest.mark.parametrize("way", [*CHOSEN, *NAMED])
async def test_no_server_leads_inside_by_any_way(way: str, server: HostileServer) -> None:
    """Twice each, for a name may change its mind: an answer of bounded size, or one of our errors, and soon."""
    network = StagedNetwork()
    network.names["public.example"] = [list(addresses) for addresses in server.addresses]
    follow = (CHOSEN | NAMED)[way]
    scheme = "https" if server.is_tls else "http"
    async with serving(network, server.handler, address=server.address, tls=tls() if server.is_tls else None):
        for _ in range(2):
            with suppress(StackError):
                assert len(str(await follow(network, f"{scheme}://public.example/"))) < 1_000_000
    assert network.honeypot == 0


def test_there_are_as_many_servers_and_ways_as_are_planned() -> None:
    """A list that shrinks would pass."""
    assert len(HOSTILE_URLS) == 42
    assert len(HOSTILE_SERVERS) == 21
    assert len(CHOSEN) + len(NAMED) == 6


@asynccontextmanager
async def misleading() -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server of this machine that sends everybody to another one; yields its address, and what that one was sent."""
    lured: list[bytes] = []

    async def honeypot(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lured.append(await reader.read(1000))
        writer.close()

    async with await asyncio.start_server(honeypot, "127.0.0.1", 0) as trap:
        target = f"http://127.0.0.1:{trap.sockets[0].getsockname()[1]}/"
        network = StagedNetwork()
        async with serving(network, answering(redirect(target, 307))):
            yield f"http://127.0.0.1:{network.ports[PUBLIC]}", lured


async def test_a_server_of_tools_is_not_followed_elsewhere() -> None:
    """Its address is the operator's, with a key for it among the headers; where it points to is its own word."""
    async with misleading() as (url, lured):
        headers = {"Authorization": "Bearer canary"}
        config = McpConfig.model_validate({"url": f"{url}/mcp", "headers": headers, "timeout_seconds": 2})
        with pytest.raises(ProviderStartError):
            await connected(config)
        assert lured == []


async def test_another_stack_is_not_followed_elsewhere() -> None:
    """As the ``remote`` provider asks it."""
    async with misleading() as (url, lured), AsyncClient(url, api_key="canary") as client:
        with pytest.raises(StackError):
            assert not [model async for model in await client.models.list_models()]
        assert lured == []

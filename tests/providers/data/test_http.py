"""The operations as a client of the draft sees them: a whole stack on a socket, judged by the draft's own schemas."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from llama_stack.apis.datasets import ReadDatasetRequest
from llama_stack.client import AsyncClient
from llama_stack.distribution import Distribution
from llama_stack.errors import InvalidRequestError, UpstreamError
from llama_stack.plugins import discover
from llama_stack.registry import Registry
from llama_stack.server import listening
from llama_stack.stack import Stack, running
from llama_stack.testing.conformance import conformance
from llama_stack.testing.stub_inference import stub
from tests.draft_schemas import DraftSchemas
from tests.providers.data.dataset_rules import MESSAGES, jsonl

pytestmark = pytest.mark.anyio

RULES = {"models": {"rules": {"rules": [{"rule": "ending"}]}}, "aliases": {"llama3_405b_reward": "rules"}}
PROVIDERS: dict[str, Any] = {
    "inference": [{"provider": "stub"}],
    "datasets": [{"provider": "datasets"}],
    "reward_scoring": [
        {"provider": "rules", "config": RULES},
        {"provider": "judge", "config": {"models": {"judge": {"judge": "stub", "attempts": 1}}}},
    ],
    "synthetic_data_generation": [
        {"provider": "synthetic_data", "config": {"generator": "llama3_8b_chat", "model": "llama3_405b_reward"}}
    ],
}


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    distribution = Distribution.model_validate(
        {"version": 1, "name": "data", "providers": PROVIDERS, "server": {"port": 0}}
    )
    stack = Stack(distribution, Registry(discover([stub])), state_folder=tmp_path)
    async with running(stack), listening(stack) as listener:
        yield listener.url


class Caller:
    """Sends bodies and gets replies that the draft allows."""

    def __init__(self, address: str) -> None:
        self.draft = DraftSchemas()
        self.http = httpx2.AsyncClient(base_url=address, trust_env=False)

    async def __call__(self, operation: str, body: Any = None, **query: str) -> Any:
        method, _, path = operation.partition(" ")
        if body is not None and operation in self.draft.operations:
            self.draft.check_request(operation, body)
        reply = await self.http.request(method, path, json=body, params=query)
        if reply.status_code != 200:
            return reply
        value = reply.json() if reply.content else None
        if operation in self.draft.operations:
            self.draft.check_reply(operation, value)
        return value


@pytest.fixture
async def call(address: str) -> AsyncIterator[Caller]:
    caller = Caller(address)
    async with caller.http:
        yield caller


DATASET = {"columns": {"dialog": "dialog"}, "content_url": jsonl({"dialog": MESSAGES}), "metadata": {"a": [1, None]}}


async def test_datasets_as_the_draft_has_them(call: Caller) -> None:
    """Create, get, delete; and 404, 409 and 422 in the one form of errors."""
    body = {"uuid": "d", "dataset": DATASET}
    assert await call("POST /datasets/create", body) is None
    assert await call("POST /datasets/create", body) is None
    assert await call("GET /datasets/get", dataset_id="d") == DATASET
    other = await call("POST /datasets/create", {"uuid": "d", "dataset": {**DATASET, "metadata": {}}})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "already_exists")
    await call("POST /datasets/hold", {"user": "job 7", "dataset": DATASET})
    held = await call("DELETE /datasets/delete", dataset_id="d")
    assert (held.status_code, held.json()["holders"]) == (409, ["job 7"])
    await call("POST /datasets/release", {"user": "job 7"})
    assert await call("DELETE /datasets/delete", dataset_id="d") is None
    missing = await call("GET /datasets/get", dataset_id="d")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    odd = {**DATASET, "columns": {"a": "picture"}}
    bad = await call.http.post("/datasets/create", json={"uuid": "e", "dataset": odd})
    assert bad.status_code == 422


async def test_rows_are_streamed_and_a_fault_has_a_place(call: Caller, address: str) -> None:
    """The first row's is in the status; after a later one the rest is asked for, which tells the reason."""
    lines = await call.http.post("/datasets/read", json={"dataset": DATASET})
    assert lines.headers["content-type"].startswith("application/jsonl")
    assert [json.loads(line) for line in lines.content.splitlines()] == [{"dialog": MESSAGES}]
    columns = {"n": "number"}
    first = await call.http.post(
        "/datasets/read", json={"dataset": {"columns": columns, "content_url": jsonl({"n": "x"}), "metadata": {}}}
    )
    assert (first.status_code, first.json()["row"], first.json()["column"]) == (422, 1, "n")
    later = {"columns": columns, "content_url": jsonl(*({"n": n} for n in range(3000)), {"n": None}), "metadata": {}}
    async with AsyncClient(address) as client:
        rows = await client.datasets.read(ReadDatasetRequest.model_validate_json(json.dumps({"dataset": later})))
        assert [(await anext(rows))["n"] for _ in range(3000)] == list(range(3000))
        with pytest.raises(UpstreamError):  # a line is a row, and has no room for an error: the connection is cut
            await anext(rows)
        again = ReadDatasetRequest.model_validate_json(json.dumps({"dataset": later, "offset": 3000}))
        with pytest.raises(InvalidRequestError, match="row 3001, column 'n'"):
            await anext(await client.datasets.read(again))


async def test_rewards_as_the_draft_has_them(call: Caller) -> None:
    """By the draft's own name; two providers share the API, each with its models."""
    body = {
        "model": "llama3_405b_reward",
        "prompt_generations": [
            {
                "dialog": {
                    "message": {"role": "user", "content": "Hi", "tool_calls": [], "tool_responses": []},
                    "message_history": [],
                },
                "k_generations": [
                    {"role": "assistant", "content": text, "tool_calls": [], "tool_responses": []}
                    for text in ("Hello.", "Hel")
                ],
            }
        ],
    }
    reply = await call("POST /reward_scoring/score", body)
    (scored,) = reply["scored_generations"]
    assert [answer["score"] for answer in scored["k_scored_generations"]] == [1.0, 0.0]
    judged = await call.http.post("/reward_scoring/score", json={**body, "model": "judge"})
    assert (judged.status_code, judged.json()["error"]["code"]) == (502, "upstream_error")
    unknown = await call.http.post("/reward_scoring/score", json={**body, "model": "llama4"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    listed = [json.loads(line) for line in (await call.http.get("/models/list")).text.splitlines()]
    assert {model["model"] for model in listed if model["kind"] == "reward"} == {"judge", "llama3_405b_reward", "rules"}


async def test_synthetic_data_as_the_draft_has_it(call: Caller) -> None:
    """The draft's ``reward_scoring`` is an object of any keys, ours are settings; an extension stores the result."""
    prompt = {"role": "user", "content": "Say hello.", "tool_calls": [], "tool_responses": []}
    plain = {"prompts": [prompt], "filtering_function": "none"}
    reply = await call("POST /synthetic_data_generation/generate", plain)
    (made,) = reply["synthetic_data"]
    assert [(a["message"]["content"], a["score"]) for a in made["k_scored_generations"]] == [
        ("Hello from the stub.", 1.0)
    ] * 4
    for function in ("random", "top_k", "top_p", "top_k_top_p", "sigmoid"):
        body = {**plain, "filtering_function": function, "reward_scoring": {"n_samples": 3, "k": 2, "seed": 1}}
        await call("POST /synthetic_data_generation/generate", body)
    stored = {**plain, "store_as": {"dataset_uuid": "made"}}
    reply = await call.http.post("/synthetic_data_generation/generate", json=stored)
    assert reply.json()["statistics"]["dataset"]["rows"] == 4
    dataset = await call("GET /datasets/get", dataset_id="made")
    assert dataset["columns"] == {"dialog": "dialog", "score": "number"}
    rows = (await call.http.post("/datasets/read", json={"dataset": dataset})).text.splitlines()
    assert [message["content"] for message in json.loads(rows[0])["dialog"]] == ["Say hello.", "Hello from the stub."]


test_datasets_conform = conformance("datasets", "datasets")
test_rules_conform = conformance("reward_scoring", "rules", config=RULES)
test_synthetic_data_conforms = conformance(
    "synthetic_data_generation",
    "synthetic_data",
    config={"generator": "stub", "model": "rules"},
    beside={
        "inference": [{"provider": "stub"}],
        "reward_scoring": [{"provider": "rules", "config": RULES}],
        "datasets": [{"provider": "datasets"}],
    },
)

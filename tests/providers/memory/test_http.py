"""Memory banks over HTTP: the draft's seven operations on both stores, and a server that no document harms."""

from __future__ import annotations

import asyncio
import json
import os
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from llama_stack.distribution import Distribution
from llama_stack.plugins import discover
from llama_stack.registry import Registry
from llama_stack.server import listening
from llama_stack.stack import Stack, running
from tests.draft_schemas import DraftSchemas
from tests.providers.memory.extraction.files import BOMBS, GOOD, malformed

pytestmark = pytest.mark.anyio

SENT_BOMBS = int(os.environ.get("LLAMA_STACK_BOMBS", "8"))
"""All fifty when asked for; the extractor's own tests have them all each time."""


@pytest.fixture(params=["sqlite", "pgvector"])
def store(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A provider, and where its rows lie."""
    provider: str = request.param
    return provider, request.getfixturevalue("postgresql_url") if provider == "pgvector" else "sqlite"


@asynccontextmanager
async def client_of(
    folder: Path, provider: str = "sqlite", url: str = "sqlite", **config: Any
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a server that has memory banks and nothing else."""
    banks = {"provider": provider, "config": {"embedder": "builtin:hashing", **config}}
    distribution = Distribution.model_validate(
        {
            "version": 1,
            "name": "t",
            "providers": {"memory_banks": [banks]},
            "storage": {"url": url},
            "server": {"port": 0, "drain_seconds": 1},
        }
    )
    stack = Stack(distribution, Registry(discover()), state_folder=folder)
    async with (
        running(stack),
        listening(stack) as server,
        httpx2.AsyncClient(trust_env=False, base_url=server.url, timeout=60) as client,
    ):
        yield client


def sent(uuid: str, content: bytes, mime_type: str = "text/plain", **metadata: Any) -> dict[str, Any]:
    """A document as JSON has it."""
    return {
        "uuid": uuid,
        "content": b64encode(content).decode(),
        "metadata": metadata,
        "mime_type": mime_type,
    }


def lines(reply: httpx2.Response) -> list[Any]:
    return [json.loads(line) for line in reply.text.splitlines()]


async def test_all_seven_operations_are_the_drafts(tmp_path: Path, store: tuple[str, str]) -> None:
    """A client that was generated from the draft reads every reply, by the draft's own schemas, on either store."""
    draft = DraftSchemas()
    stored = [sent("oslo", "Oslo æ".encode(), n=1, deep={"a": [None, 1.5]}), sent("rome", b"Rome", n=1)]
    changed = [stored[0] | {"metadata": {}}]
    calls: list[tuple[str, str, dict[str, str], Any, list[Any]]] = [
        ("GET", "/memory_banks/get", {}, None, []),
        ("POST", "/memory_banks/create", {"bank_uuid": "b", "bank_name": "B"}, stored[:1], []),
        ("POST", "/memory_banks/create", {"bank_uuid": "c", "bank_name": "C"}, [], []),
        ("GET", "/memory_banks/get", {}, None, [{"uuid": "b", "name": "B"}, {"uuid": "c", "name": "C"}]),
        ("POST", "/memory_bank/insert", {"bank_uuid": "b"}, stored[1:], []),
        ("POST", "/memory_bank/update", {"bank_uuid": "b"}, changed, []),
        ("POST", "/memory_bank/get", {"bank_uuid": "b"}, ["rome", "none", "oslo"], [stored[1], changed[0]]),
        ("POST", "/memory_bank/get", {"bank_uuid": "b"}, [], []),
        ("POST", "/memory_bank/delete", {"bank_uuid": "b"}, ["none", "rome"], ["rome"]),
        ("POST", "/memory_bank/delete", {"bank_uuid": "b"}, [], []),
        ("DELETE", "/memory_banks/drop", {"bank_uuid": "b"}, None, ["b"]),
    ]
    async with client_of(tmp_path, *store) as client:
        for method, path, query, body, expected in calls:
            if body is not None:
                draft.check_request(f"{method} {path}", body)
            reply = await client.request(method, path, params=query, json=body)
            assert reply.status_code == 200, reply.text
            assert lines(reply) == expected
            for value in lines(reply):
                draft.check_reply(f"{method} {path}", value)


async def test_what_the_draft_lacks_is_there_on_both_stores(tmp_path: Path, store: tuple[str, str]) -> None:
    """A dry run shows the chunks, a query finds them, and each refusal is a problem document with its status."""
    async with client_of(tmp_path, *store) as client:
        bank = {"bank_uuid": "b", "bank_name": "B", "chunk_tokens": "16", "chunk_overlap": "0", "index": "hnsw"}
        text = b"The ship left the harbour at dawn. Nobody on the quay saw where it went, or who steered it."
        assert (await client.post("/memory_banks/create", params=bank, json=[])).status_code == 200
        preview = await client.post("/memory_bank/preview", params={"bank_uuid": "b"}, json=[sent("d", text)])
        chunks = [chunk["text"] for chunk in lines(preview)]
        assert [chunk["text"] for chunk in lines(preview)] == [
            text[chunk["start"] : chunk["end"]].decode() for chunk in lines(preview)
        ]
        assert len(chunks) == 2
        await client.post("/memory_bank/insert", params={"bank_uuid": "b"}, json=[sent("d", text, year=1997)])
        for mode in ("vector", "keyword", "hybrid"):
            query = {"bank_uuid": "b", "text": "ship quay", "mode": mode, "filter": {"lt": ["year", 2000]}}
            hits = (await client.post("/memory_bank/query", json=query)).json()["hits"]
            assert {hit["text"] for hit in hits} == set(chunks)
        for path, params, body, status, code in (
            ("/memory_bank/insert", {"bank_uuid": "b"}, [sent("d", text)], 409, "conflict"),
            ("/memory_bank/insert", {"bank_uuid": "none"}, [], 404, "not_found"),
            ("/memory_bank/update", {"bank_uuid": "b"}, [sent("new", text)], 404, "not_found"),
            ("/memory_bank/insert", {"bank_uuid": "b"}, [sent("x", b"\xff")], 422, "document_unreadable"),
            ("/memory_banks/create", {"bank_uuid": "b", "bank_name": "Other"}, [], 409, "already_exists"),
            ("/memory_banks/create", {"bank_uuid": "n", "bank_name": "N", "index": "ivf"}, [], 422, "validation"),
            (
                "/memory_banks/create",
                {"bank_uuid": "n", "bank_name": "N", "embedding_model": "none"},
                [],
                404,
                "model_not_found",
            ),
            ("/memory_bank/query", {}, {"bank_uuid": "b", "filter": {"like": ["a", 1]}}, 422, "validation"),
            ("/memory_bank/query", {}, {"bank_uuid": "b", "embedding": [1.0]}, 422, "validation"),
        ):
            reply = await client.post(path, params=params, json=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (status, code), reply.text


def resident_bytes() -> int:
    """What this process has in memory, without its children."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


async def test_no_document_harms_the_server(tmp_path: Path) -> None:
    """Bombs and a hundred malformed documents: typed errors, readiness throughout, and bounded memory.

    Where a library finds a way to read a bomb within the limits, its text is stored; most are refused.
    """
    names = list(BOMBS)[:: max(len(BOMBS) // SENT_BOMBS, 1)]
    limits = {"seconds": 2, "memory_bytes": 268_435_456, "pages": 500}
    async with client_of(tmp_path, documents=limits) as client:
        is_done = asyncio.Event()

        async def watch() -> tuple[int, int]:
            states, most = 0, 0
            while not is_done.is_set():
                assert (await client.get("/health/ready")).status_code == 200
                states, most = states + 1, max(most, resident_bytes())
                await asyncio.sleep(0.02)
            return states, most

        async def insert(uuid: str, mime_type: str, content: bytes) -> httpx2.Response:
            document = sent(uuid, content, mime_type)
            return await client.post("/memory_bank/insert", params={"bank_uuid": "b"}, json=[document])

        assert (await client.post("/memory_banks/create?bank_uuid=b&bank_name=B", json=[])).status_code == 200
        assert (await insert("good", "text/html", GOOD["text/html"])).status_code == 200
        before = resident_bytes()
        watching = asyncio.create_task(watch())
        refused = []
        for name in names:
            reply = await insert(name, *BOMBS[name]())
            if reply.status_code != 200:
                refused.append(name)
                assert (reply.status_code, reply.json()["error"]["code"]) == (422, "document_unreadable"), name
        assert len(refused) >= 0.8 * len(names)
        for number, document in enumerate(malformed()):
            reply = await insert(f"malformed {number}", *document)
            assert (reply.status_code, reply.json()["error"]["code"]) == (422, "document_unreadable")
        is_done.set()
        states, most = await watching
        print(f"{len(refused)} of {len(names)} refused, ready {states} times, {(most - before) / 1e6:.0f} MB more")
        assert states > 10
        assert most - before < 150_000_000
        assert (await insert("last", "application/pdf", GOOD["application/pdf"])).status_code == 200
        held = await client.post("/memory_bank/query", json={"bank_uuid": "b", "k": 1000})
        assert {"good", "last"} <= {hit["document_uuid"] for hit in held.json()["hits"]}

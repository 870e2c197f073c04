"""Crowds of clients over real sockets: who leaves, at whatever moment, gives everything back, and who stays is served.

``LLAMA_STACK_DISCONNECTS=2800`` lets so many leave instead of 84, and ``LLAMA_STACK_STREAM_SECONDS=60`` makes 500
streams ask on for a minute instead of 3 seconds; ``make storms`` does both.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from llama_stack_meta_reference.inference.engine import Engine
from llama_stack_meta_reference.inference.provider import MetaReferenceInference

from llama_stack.distribution import Distribution
from llama_stack.plugins import discover
from llama_stack.registry import Registry
from llama_stack.server import Listener, listening
from llama_stack.stack import Stack, running
from tests.server.serving import RawClient

pytestmark = pytest.mark.anyio

DISCONNECTS = int(os.environ.get("LLAMA_STACK_DISCONNECTS", "84"))
STREAM_SECONDS = float(os.environ.get("LLAMA_STACK_STREAM_SECONDS", "3"))
CROWD = 28
STREAMS = 500
PATH = "/inference/completion"


@asynccontextmanager
async def serving(folder: Path, **settings: object) -> AsyncIterator[tuple[Listener, Engine]]:
    model = {"checkpoint": str(folder), "device": "cpu", **settings}
    distribution = Distribution.model_validate(
        {
            "version": 1,
            "name": "storm",
            "providers": {"inference": [{"provider": "meta-reference", "config": {"models": {"m": model}}}]},
            "storage": {"url": "sqlite::memory:"},
            "server": {"port": 0},
        }
    )
    stack = Stack(distribution, Registry(discover()))
    async with running(stack), listening(stack) as listener:
        provider = stack._providers[0].started
        assert isinstance(provider, MetaReferenceInference)
        yield listener, provider._models["m"].engine


async def connect(listener: Listener) -> RawClient:
    return RawClient(*await asyncio.open_connection("127.0.0.1", listener.port))


async def leave_midway(listener: Listener, chance: random.Random) -> None:
    """Ask for a long answer and go: before, while or after it comes, politely or not."""
    client = await connect(listener)
    prompt = "the cat sat on " * chance.choice((1, 3))
    body = {"model": "m", "content": prompt, "stream": chance.random() < 0.8, "max_tokens": 60}
    await client.post(PATH, body, connection="close")
    for _ in range(chance.choice((0, 0, 1, 3, 20, 1000))):
        if not await client.reader.readline():
            break
    client.abort() if chance.random() < 0.5 else client.close()


async def test_clients_that_leave_at_any_moment_give_every_block_back(worded_checkpoint: Path) -> None:
    """The step that runs when the server learns of it is the last one for them, so the next crowd finds all free."""
    chance = random.Random(0)
    async with serving(worded_checkpoint, max_sequences=8, cache_tokens=600) as (listener, engine):
        for _ in range(0, DISCONNECTS, CROWD):
            await asyncio.gather(*(leave_midway(listener, chance) for _ in range(CROWD)))
            async with asyncio.timeout(60):
                while listener.connections:
                    await asyncio.sleep(0.001)
            noticed = engine.steps
            async with asyncio.timeout(60):
                while engine.running or engine.waiting:
                    await asyncio.sleep(0.001)
            assert engine.steps - noticed <= 1
            assert engine.free_blocks == engine.blocks
        counted = engine.metrics()
        assert counted.generated_tokens > DISCONNECTS
        assert counted.failed_steps == counted.restarts == 0


async def test_five_hundred_streams_at_a_time_are_served_to_their_ends(worded_checkpoint: Path) -> None:
    """Each waits its turn and none is refused or cut; each of the 500 asks again as long as the time is not up."""
    async with serving(worded_checkpoint, max_sequences=64, queue_size=STREAMS) as (listener, engine):
        ends = time.monotonic() + STREAM_SECONDS

        async def ask_on(number: int) -> int:
            answered = 0
            while not answered or time.monotonic() < ends:
                client = await connect(listener)
                body = {"model": "m", "content": f"stream {number}", "stream": True, "max_tokens": 40}
                await client.post(PATH, body, connection="close")
                data = await client.reader.read()
                while piece := await client.reader.read():
                    data += piece
                client.close()
                assert data.startswith(b"HTTP/1.1 200")
                assert b"event: error" not in data
                assert data.count(b'"stop_reason":"max_tokens"') + data.count(b'"stop_reason":"finished_ok"') == 1
                answered += 1
            return answered

        answered = await asyncio.gather(*map(ask_on, range(STREAMS)))
        assert min(answered) >= 1
        assert engine.free_blocks == engine.blocks
        assert engine.metrics().failed_steps == 0

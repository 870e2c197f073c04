"""Jobs as a client of the draft sees them, and as the command line shows them: over a socket, without inference."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner
from llama_stack_meta_reference.post_training.commands import jobs
from llama_stack_meta_reference.post_training.picture import Picture, plot

from llama_stack.server import listening
from llama_stack.stack import running
from tests.draft_schemas import DraftSchemas
from tests.providers.meta_reference.post_training.stage import distribution, dpo_body, sft_body, stack

pytestmark = pytest.mark.anyio


@pytest.fixture
async def address(worded_checkpoint: Path, tmp_path: Path) -> AsyncIterator[str]:
    described = distribution(tmp_path, worded_checkpoint, models={"llama3_8b": str(worded_checkpoint)})
    del described["providers"]["inference"]
    up = stack(tmp_path, described)
    async with running(up), listening(up) as listener:
        yield listener.url


async def run(*arguments: str, url: str) -> tuple[int, str]:
    """The command's exit code and what it printed."""
    result = await asyncio.to_thread(CliRunner().invoke, jobs, [*arguments, "--url", url], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value or 0, result.output


async def test_every_operation_is_the_drafts_and_the_commands_show_the_same(address: str, tmp_path: Path) -> None:
    """Bodies and replies are valid by the draft's own schemas, from queued to ended."""
    draft = DraftSchemas()
    async with httpx2.AsyncClient(base_url=address, trust_env=False, timeout=60) as http:

        async def call(operation: str, body: Any = None, **query: str) -> Any:
            method, _, path = operation.partition(" ")
            if body is not None:
                draft.check_request(operation, body)
            reply = await http.request(method, path, json=body, params=query)
            assert reply.status_code == 200, reply.text
            value = reply.json() if reply.content else None
            draft.check_reply(operation, value)
            return value

        async def look(job: str) -> Any:
            for what in ("logs", "artifacts"):
                await call(f"GET /post_training/job/{what}", job_uuid=job)
            return await call("GET /post_training/job/status", job_uuid=job)

        await call("POST /post_training/supervised_fine_tune/", sft_body(tmp_path, "one"))
        await look("one")
        async with http.stream(
            "GET", "/post_training/job/logs", params={"job_uuid": "one"}, headers={"accept": "text/event-stream"}
        ) as reply:
            assert reply.headers["content-type"] == "text/event-stream"
            events = [line async for line in reply.aiter_lines() if line]
        lines = []
        for event in events:
            assert event.startswith("data: ")
            value = json.loads(event.removeprefix("data: "))
            draft.check_reply("GET /post_training/job/logs", value)
            lines += value["log_lines"]
        status = await look("one")
        assert status["status"] == "completed"
        await call(
            "POST /post_training/preference_optimize/", dpo_body(tmp_path, "two", status["checkpoints"][0]["path"])
        )
        code, watched = await run("watch", "two", url=address)
        assert (code, watched.splitlines()[-1]) == (0, "two is completed")
        assert "8/8" in watched
        await look("two")
        assert (await run("logs", "one", url=address)) == (0, "\n".join(lines) + "\n")
        assert (await run("logs", "--follow", "one", url=address)) == (0, "\n".join(lines) + "\n")
        _, listed = await run("list", "--json", url=address)
        assert json.loads(listed) == [{"job": "two", "status": "completed"}, {"job": "one", "status": "completed"}]

        endless = sft_body(tmp_path, "three", training_config={"n_iters": 1_000_000})
        await call("POST /post_training/supervised_fine_tune/", endless)
        assert await run("cancel", "three", url=address) == (0, "three is cancelled\n")
        code, watched = await run("watch", "three", url=address)
        assert (code, watched.splitlines()[-1]) == (1, "three is failed: it was cancelled")
        assert (await look("three"))["status"] == "failed"


def test_a_picture_has_a_bar_a_rate_and_a_plot_of_the_losses() -> None:
    """As wide and as high as the terminal, whatever comes; what a killed trainer told of twice is drawn once."""
    picture = Picture("polite")
    assert picture.lines(columns=40, rows=10) == ["polite: 0/?", "░" * 39]
    picture.take('2026-01-01T00:00:00.000Z started iters=0 total_iters=40 device="a b"')
    for iters in range(1, 21):
        picture.take(f"2026-01-01T00:00:{iters:02}.000Z step iters={iters} loss={21 - iters} seconds_left=70.4")
    picture.take("2026-01-01T00:00:20.000Z validation iters=20 loss=3.5")
    summary, bar, *drawn = picture.lines(columns=79, rows=6)
    assert summary == "polite: 20/40  1 iterations/s  1 min 10 s left  loss 1  validation 3.5"
    assert bar == "█" * 39 + "░" * 39
    assert len(drawn) == 4
    assert drawn[0] == "       20 █▆▅▃▁" + " " * 15
    assert drawn[3].startswith("        1 ████")
    assert drawn[3].endswith("▁")
    picture.take("2026-01-01T00:01:00.000Z started iters=10 total_iters=40")
    assert picture.summary().startswith("polite: 10/40")
    assert "loss 11 " in picture.summary()
    for line in ("", "x", "x step", "x step iters=a loss=b", "x started total_iters="):
        picture.take(line)
    assert all(len(line) <= 30 for line in picture.lines(columns=31, rows=8))
    assert plot([1.0, float("nan"), 1.0], 10, 2) == ["        1   ", "        1 ▁▁"]

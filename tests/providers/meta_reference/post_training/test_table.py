"""The table of jobs, on both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from llama_stack_meta_reference.post_training.jobs import MIGRATIONS, Job, Jobs

from llama_stack.apis.post_training import JobStatus
from llama_stack.errors import AlreadyExistsError, ConflictError, NotFoundError, OverloadedError
from llama_stack.storage import open_store

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def table(url: str, folder: Path) -> AsyncIterator[Jobs]:
    async with open_store(url, folder) as store:
        database = store.database("post_training.test")
        await database.migrate(MIGRATIONS)
        yield Jobs(database)


def job(uuid: str, request: str = "{}") -> Job:
    return Job(uuid, "sft", request, "{}", None, "base")


async def test_the_queue_keeps_its_promises_in_sqlite(tmp_path: Path) -> None:
    async with table("sqlite", tmp_path) as jobs:
        await check(jobs)


async def test_the_queue_keeps_its_promises_in_postgresql(postgresql_schema_url: str, tmp_path: Path) -> None:
    async with table(postgresql_schema_url, tmp_path) as jobs:
        await check(jobs)


async def check(jobs: Jobs) -> None:
    """A job is taken once, runs in order and ends once: statement by statement."""
    assert await jobs.add(job("a"), queue_size=2)
    assert not await jobs.add(job("a"), queue_size=2)
    with pytest.raises(AlreadyExistsError):
        await jobs.add(job("a", "[]"), queue_size=2)
    assert await jobs.add(job("b"), queue_size=2)
    with pytest.raises(OverloadedError, match="2 jobs wait"):
        await jobs.add(job("c"), queue_size=2)
    assert [each.uuid for each in await jobs.unfinished()] == ["a", "b"]
    first = await jobs.begin("a", -1)
    assert first is not None
    assert (first.status, first.attempts) == (JobStatus.RUNNING, 1)
    again = await jobs.begin("a", -1)
    assert again is not None
    assert (again.attempts, again.started_at) == (2, first.started_at)
    await jobs.uncount("a")
    for iters, attempts in ((4, 1), (4, 2), (8, 1)):
        further = await jobs.begin("a", iters)
        assert further is not None
        assert further.attempts == attempts
    await jobs.requeue_running()
    assert [status for _, status in await jobs.newest_first()] == [JobStatus.SCHEDULED] * 2
    await jobs.cancel("b")
    with pytest.raises(ConflictError):
        await jobs.cancel("b")
    with pytest.raises(NotFoundError):
        await jobs.cancel("c")
    assert not await jobs.complete("b")
    assert await jobs.begin("b", 0) is None
    assert await jobs.complete("a")
    assert not await jobs.fail("a", "too late")
    ended = await jobs.get("a")
    assert (ended.status, ended.reason) == (JobStatus.COMPLETED, None)
    assert await jobs.of_folder(ended.folder_name) == ended
    assert await jobs.of_folder("x") is None
    assert {each.uuid for each in await jobs.holding()} == {"a", "b"}
    await jobs.released("a")
    await jobs.forget("b")
    assert [each.uuid for each in await jobs.holding()] == []

"""Checks of Datasets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from ...apis import Datasets
from ...apis.datasets import ColumnKind, CreateDatasetRequest, Dataset
from ...errors import AlreadyExistsError, ConflictError, NotFoundError
from .checks import check, everything, refused
from .inference import starts_and_stops
from .subject import Subject

_ROWS = "data:application/jsonl;base64,eyJ0ZXh0IjogIk9uZS4ifQp7InRleHQiOiAiVHdvLiJ9Cg=="


def _dataset(**more: Any) -> Dataset:
    given = {"columns": {"text": ColumnKind.TEXT}, "content_url": _ROWS, "metadata": {"made": "by a check"}}
    return Dataset(**(given | more))


@asynccontextmanager
async def _created(subject: Subject) -> AsyncIterator[str]:
    uuid = subject.new_id("dataset")
    await subject.client.datasets.create_dataset(CreateDatasetRequest(uuid=uuid, dataset=_dataset()))
    try:
        yield uuid
    finally:
        with suppress(NotFoundError):
            await subject.client.datasets.delete_dataset(uuid)


@check(Datasets)
async def a_dataset_comes_back_as_it_was_created(subject: Subject) -> None:
    """Columns, address and metadata are what was sent."""
    async with _created(subject) as uuid:
        assert await subject.client.datasets.get_dataset(uuid) == _dataset()


@check(Datasets)
async def creating_again_succeeds_with_the_same_request_alone(subject: Subject) -> None:
    """The same request again is a success, and another one of that id is a 409."""
    async with _created(subject) as uuid:
        datasets = subject.client.datasets
        await datasets.create_dataset(CreateDatasetRequest(uuid=uuid, dataset=_dataset()))
        other = CreateDatasetRequest(uuid=uuid, dataset=_dataset(metadata={}))
        await refused(datasets.create_dataset(other), AlreadyExistsError, ConflictError)
        assert await datasets.get_dataset(uuid) == _dataset(), "the refused request changed it"


@check(Datasets)
async def of_two_at_once_one_creates(subject: Subject) -> None:
    """Of several requests for one id that differ, exactly one succeeds."""
    uuid = subject.new_id("dataset")
    requests = [CreateDatasetRequest(uuid=uuid, dataset=_dataset(metadata={"n": n})) for n in range(4)]
    calls = [subject.client.datasets.create_dataset(request) for request in requests]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    await subject.client.datasets.delete_dataset(uuid)
    won = sum(outcome is None for outcome in outcomes)
    assert won == 1, f"{won} of 4 succeeded"


@check(Datasets)
async def a_dataset_is_listed_until_it_is_deleted(subject: Subject) -> None:
    """It is in the list with its id, and neither listed nor found after its delete."""
    async with _created(subject) as uuid:
        datasets = subject.client.datasets
        listed = await everything(await datasets.list_datasets())
        assert uuid in [one.uuid for one in listed], "it is not listed"
        await datasets.delete_dataset(uuid)
        listed = await everything(await datasets.list_datasets())
        assert uuid not in [one.uuid for one in listed], "it is listed after its delete"
        await refused(datasets.get_dataset(uuid), NotFoundError)
        await refused(datasets.delete_dataset(uuid), NotFoundError)


@check(Datasets)
async def datasets_outlive_a_restart(subject: Subject) -> None:
    """What was created is there after a restart."""
    uuid = subject.new_id("dataset")
    await subject.client.datasets.create_dataset(CreateDatasetRequest(uuid=uuid, dataset=_dataset()))
    await subject.restart()
    found = await subject.client.datasets.get_dataset(uuid)
    await subject.client.datasets.delete_dataset(uuid)
    assert found == _dataset()


@check(Datasets)
async def it_starts_and_stops_without_leaving_anything(subject: Subject) -> None:
    """A start and a stop leave no thread, no open file, no process and no task behind."""
    await starts_and_stops(subject)

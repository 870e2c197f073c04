"""Checks of Datasets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from ...apis import Datasets
from ...apis.datasets import (
    ColumnKind,
    CreateDatasetRequest,
    Dataset,
    HoldDatasetRequest,
    ReadDatasetRequest,
    ReleaseDatasetsRequest,
    StoreDatasetRequest,
)
from ...errors import AlreadyExistsError, ConflictError, InvalidRequestError, NotFoundError, NotProvidedError
from .checks import Skipped, check, everything, refused
from .subject import Subject

_KINDS: dict[ColumnKind, Any] = {
    ColumnKind.DIALOG: [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4, \u2028 of course."},
    ],
    ColumnKind.TEXT: "Ærø, 東京, \U0001f600",
    ColumnKind.MEDIA: "https://example.com/a.png",
    ColumnKind.NUMBER: -1.5,
    ColumnKind.JSON: {"deep": [None, True]},
}
"""A cell of each kind."""
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
async def rows_come_in_their_order(subject: Subject) -> None:
    """A read gives the rows as they were written, all of them or the span that was asked for."""
    rows = [{"text": "One."}, {"text": "Two."}]
    for span, wanted in (({}, rows), ({"offset": 1}, rows[1:]), ({"limit": 1}, rows[:1]), ({"offset": 2}, [])):
        request = ReadDatasetRequest(dataset=_dataset(), **span)
        found = await everything(await subject.client.datasets.read(request))
        assert found == wanted, f"{span}: {found}"


@check(Datasets)
async def a_row_that_does_not_fit_is_named(subject: Subject) -> None:
    """A cell of another kind, a column that is missing and one that nobody declared are a 422 with row and column."""
    for columns, column in (
        ({"text": ColumnKind.NUMBER}, "text"),
        ({"text": ColumnKind.TEXT, "more": ColumnKind.JSON}, "more"),
        ({"other": ColumnKind.TEXT}, ""),
    ):
        request = ReadDatasetRequest(dataset=_dataset(columns=columns))
        error = await refused(subject.client.datasets.read(request), InvalidRequestError)
        assert "row 1" in error.detail, f"the error does not name the row: {error.detail}"
        assert column in error.detail, f"the error does not name the column: {error.detail}"


@check(Datasets)
async def stored_rows_come_back(subject: Subject) -> None:
    """Rows of every kind are stored in one call, outlive a restart, and are gone with the last dataset of them."""
    uuid = subject.new_id("dataset")
    columns = {kind.value: kind for kind in _KINDS}
    row: dict[str, Any] = {kind.value: cell for kind, cell in _KINDS.items()}
    request = StoreDatasetRequest(uuid=uuid, columns=columns, rows=[row, row], metadata={"a": 1})
    dataset = await subject.client.datasets.store(request)
    assert dataset == await subject.client.datasets.get_dataset(uuid), "another description was registered"
    assert dataset == await subject.client.datasets.store(request), "the same again is another one"
    with suppress(Skipped):
        await subject.restart()
    found = await everything(await subject.client.datasets.read(ReadDatasetRequest(dataset=dataset)))
    assert found == [row, row], f"{found}"
    other = request.model_copy(update={"rows": [row]})
    await refused(subject.client.datasets.store(other), AlreadyExistsError, ConflictError)
    await subject.client.datasets.delete_dataset(uuid)


@check(Datasets)
async def a_dataset_in_use_is_not_deleted(subject: Subject) -> None:
    """While somebody holds a dataset its delete is a 409 that names who, until all have released it."""
    async with _created(subject) as uuid:
        datasets = subject.client.datasets
        users = [subject.new_id("job") for _ in range(2)]
        try:
            for user in users:
                await datasets.hold(HoldDatasetRequest(user=user, dataset=_dataset()))
            for user in users:
                error = await refused(datasets.delete_dataset(uuid), ConflictError)
                assert user in error.detail, f"the error does not name who uses it: {error.detail}"
                await datasets.release(ReleaseDatasetsRequest(user=user))
                await datasets.release(ReleaseDatasetsRequest(user=user))
        finally:
            for user in users:
                with suppress(NotProvidedError):
                    await datasets.release(ReleaseDatasetsRequest(user=user))
        await datasets.delete_dataset(uuid)

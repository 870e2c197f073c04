"""What the provider of datasets keeps to on any store, beyond the conformance kit: cells, spans, holds."""

from __future__ import annotations

import asyncio
import base64
import json
from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from llama_stack.apis import Datasets
from llama_stack.apis.datasets import (
    ColumnKind,
    CreateDatasetRequest,
    Dataset,
    HoldDatasetRequest,
    ReadDatasetRequest,
    ReleaseDatasetsRequest,
    StoreDatasetRequest,
)
from llama_stack.errors import AlreadyExistsError, ConflictError, InvalidRequestError, NotFoundError

UNICODE = "Ærø, 東京, עברית, e\u0301, \U0001f600\u2028, a\ttab, \u0000"
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": [UNICODE]}]
GOOD: Mapping[ColumnKind, tuple[Any, ...]] = {
    ColumnKind.DIALOG: ([], MESSAGES, [*MESSAGES, {"role": "tool", "content": "", "tool_responses": []}]),
    ColumnKind.TEXT: ("", UNICODE, "x" * 100_000),
    ColumnKind.MEDIA: ("https://example.com/a.png", {"url": "data:image/png;base64,AA==", "mime_type": "image/png"}),
    ColumnKind.NUMBER: (0, -1.5, 1e300, 2**63 - 1),
    ColumnKind.JSON: (None, True, "a", [1, {"b": [None]}], {"deep": {UNICODE: 1.5}}),
}
"""Cells that fit their kind."""
BAD: Mapping[ColumnKind, tuple[Any, ...]] = {
    ColumnKind.DIALOG: (
        None,
        "hi",
        {},
        [{"role": "user"}],
        [{"role": "usr", "content": ""}],
        [["a"]],
        [{**MESSAGES[0], "x": 1}],
    ),
    ColumnKind.TEXT: (None, 1, True, ["a"], {}),
    ColumnKind.MEDIA: (None, 1, "", "ftp://example.com/a", {"url": "https://example.com"}, []),
    ColumnKind.NUMBER: (None, "1", True, [], 2**70),
}
"""Cells that do not; ``json`` takes any value."""


def jsonl(*rows: Any) -> str:
    """A ``data:`` URL of JSON lines."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return "data:application/jsonl;base64," + base64.b64encode(lines.encode()).decode()


def described(*rows: Any, metadata: Mapping[str, Any] | None = None, **columns: ColumnKind) -> Dataset:
    """A dataset of these rows, in its URL."""
    return Dataset(columns=columns, content_url=jsonl(*rows), metadata=dict(metadata or {}))


async def rows_of(datasets: Datasets, dataset: Dataset, **span: int) -> list[dict[str, Any]]:
    """The rows that a read gives."""
    return [row async for row in await datasets.read(ReadDatasetRequest(dataset=dataset, **span))]


async def ids_of(datasets: Datasets) -> list[str]:
    """The ids that a list gives."""
    return [named.uuid async for named in await datasets.list_datasets()]


PRIMES = described(
    {"n": 2, "word": "two"},
    {"n": 3, "word": "three"},
    {"n": 5, "word": "five"},
    n=ColumnKind.NUMBER,
    word=ColumnKind.TEXT,
)


class DatasetRules:
    """A subclass says how the provider is opened."""

    pytestmark = pytest.mark.anyio

    @abstractmethod
    def open(self, folder: Path) -> AbstractAsyncContextManager[Datasets]:
        """A provider whose state lies in ``folder``; it is closed at the end of the block."""

    @pytest.fixture
    async def datasets(self, tmp_path: Path) -> AsyncIterator[Datasets]:
        """A provider with the dataset ``primes``."""
        async with self.open(tmp_path / "state") as datasets:
            await datasets.create_dataset(CreateDatasetRequest(uuid="primes", dataset=PRIMES))
            yield datasets

    async def test_datasets_are_listed_got_and_deleted(self, datasets: Datasets) -> None:
        """What comes back is what was registered, and a deleted id is free."""
        odd = described(metadata={"a": [None, {"ü": 1.5}]}, **{"ключ/\"'": ColumnKind.JSON})
        await datasets.create_dataset(CreateDatasetRequest(uuid="odd/%_'😀", dataset=odd))
        assert await datasets.get_dataset("odd/%_'😀") == odd
        assert sorted(await ids_of(datasets)) == ["odd/%_'😀", "primes"]
        await datasets.delete_dataset("primes")
        assert await ids_of(datasets) == ["odd/%_'😀"]
        await datasets.create_dataset(CreateDatasetRequest(uuid="primes", dataset=odd))
        assert await datasets.get_dataset("primes") == odd

    async def test_creating_again_succeeds_only_with_the_same_dataset(self, datasets: Datasets) -> None:
        """A client that got no answer repeats its request (spec rule G10); the order of columns says nothing."""
        columns = dict(reversed(PRIMES.columns.items()))
        await datasets.create_dataset(
            CreateDatasetRequest(uuid="primes", dataset=PRIMES.model_copy(update={"columns": columns}))
        )
        for other in (
            PRIMES.model_copy(update={"metadata": {"a": 1}}),
            PRIMES.model_copy(update={"content_url": jsonl()}),
            PRIMES.model_copy(update={"columns": {"n": ColumnKind.NUMBER}}),
        ):
            with pytest.raises(AlreadyExistsError):
                await datasets.create_dataset(CreateDatasetRequest(uuid="primes", dataset=other))
        assert await datasets.get_dataset("primes") == PRIMES

    async def test_an_unknown_id_is_not_found(self, datasets: Datasets) -> None:
        """404 that names it."""
        for call in (datasets.get_dataset("none"), datasets.delete_dataset("none")):
            with pytest.raises(NotFoundError, match="none"):
                await call

    async def test_rows_come_in_their_order_and_by_span(self, datasets: Datasets) -> None:
        """A reader that was interrupted goes on where it was."""
        whole = await rows_of(datasets, PRIMES)
        assert [row["n"] for row in whole] == [2, 3, 5]
        assert await rows_of(datasets, PRIMES, offset=1) == whole[1:]
        assert await rows_of(datasets, PRIMES, offset=1, limit=1) == whole[1:2]
        assert await rows_of(datasets, PRIMES, limit=0) == []
        assert await rows_of(datasets, PRIMES, offset=99) == []
        assert await rows_of(datasets, described(n=ColumnKind.NUMBER)) == []

    async def test_a_reader_may_stop_midway(self, datasets: Datasets) -> None:
        """Closing the iterator ends the work, and the next read begins anew."""
        many = described(*({"n": n} for n in range(20_000)), n=ColumnKind.NUMBER)
        for _ in range(3):
            rows = await datasets.read(ReadDatasetRequest(dataset=many))
            assert await anext(rows) == {"n": 0}
            await rows.aclose()  # type: ignore[attr-defined]  # an async generator, as every provider's stream is
        assert len(await rows_of(datasets, many)) == 20_000

    @pytest.mark.parametrize("kind", list(ColumnKind))
    async def test_cells_are_held_to_their_kind(self, datasets: Datasets, kind: ColumnKind) -> None:
        """What fits comes back as it was written; what does not is named by row and column."""
        good = [{"cell": cell} for cell in GOOD[kind]]
        assert await rows_of(datasets, described(*good, cell=kind)) == good
        for bad in BAD.get(kind, ()):
            with pytest.raises(InvalidRequestError, match=r"row 2\b.*'cell'"):
                await rows_of(datasets, described(good[0], {"cell": bad}, cell=kind))

    async def test_a_row_has_exactly_the_declared_columns(self, datasets: Datasets) -> None:
        """A misspelt column must not read as an absent one, nor as nothing."""
        for row, column in (({"a": 1}, "b"), ({"a": 1, "b": 2, "c": 3}, "c"), ({}, "a")):
            with pytest.raises(InvalidRequestError, match=rf"row 1\b.*'{column}'"):
                await rows_of(datasets, described(row, a=ColumnKind.NUMBER, b=ColumnKind.NUMBER))
        with pytest.raises(InvalidRequestError, match=r"row 1\b"):
            await rows_of(datasets, described([1], a=ColumnKind.NUMBER))

    async def test_the_rows_before_a_faulty_one_come_first(self, datasets: Datasets) -> None:
        """The place that the error names is then the place where the stream stopped."""
        faulty = described({"n": 1}, {"n": 2}, {"n": "3"}, n=ColumnKind.NUMBER)
        rows = await datasets.read(ReadDatasetRequest(dataset=faulty))
        assert [await anext(rows), await anext(rows)] == [{"n": 1}, {"n": 2}]
        with pytest.raises(InvalidRequestError, match=r"row 3\b"):
            await anext(rows)

    async def test_a_file_is_read_only_where_the_operator_allows_it(self, datasets: Datasets, tmp_path: Path) -> None:
        """By default nowhere."""
        (tmp_path / "rows.jsonl").write_text('{"n": 1}\n')
        for url in (f"file://{tmp_path}/rows.jsonl", "http://127.0.0.1/rows.jsonl", "file:///etc/passwd"):
            with pytest.raises(InvalidRequestError):
                await rows_of(datasets, Dataset(columns={"n": ColumnKind.NUMBER}, content_url=url, metadata={}))

    async def test_rows_are_stored_and_read_back(self, datasets: Datasets) -> None:
        """In one call; again the same is a success, other rows under that id are not."""
        rows: list[dict[str, Any]] = [{"d": MESSAGES, "t": UNICODE}, {"d": [], "t": ""}]
        request = StoreDatasetRequest(
            uuid="mine", columns={"d": ColumnKind.DIALOG, "t": ColumnKind.TEXT}, rows=rows, metadata={"by": "me"}
        )
        dataset = await datasets.store(request)
        assert dataset == await datasets.get_dataset("mine") == await datasets.store(request)
        assert (dataset.columns, dataset.metadata) == (request.columns, {"by": "me"})
        assert await rows_of(datasets, dataset) == rows
        with pytest.raises(AlreadyExistsError):
            await datasets.store(request.model_copy(update={"rows": rows[:1]}))
        with pytest.raises(InvalidRequestError, match=r"row 2\b.*'t'"):
            await datasets.store(request.model_copy(update={"uuid": "new", "rows": [rows[0], {"d": [], "t": 1}]}))
        assert sorted(await ids_of(datasets)) == ["mine", "primes"]
        await datasets.delete_dataset("mine")
        with pytest.raises(InvalidRequestError):
            await rows_of(datasets, dataset)

    async def test_stored_rows_live_as_long_as_somebody_names_them(self, datasets: Datasets) -> None:
        """Two ids may stand for the same rows, and a job may hold them."""
        request = StoreDatasetRequest(uuid="one", columns={"n": ColumnKind.NUMBER}, rows=[{"n": 1}])
        one = await datasets.store(request)
        two = one.model_copy(update={"metadata": {"second": True}})
        await datasets.create_dataset(CreateDatasetRequest(uuid="two", dataset=two))
        await datasets.delete_dataset("one")
        assert await rows_of(datasets, two) == [{"n": 1}]
        other = one.model_copy(update={"metadata": {"held": True}})
        await datasets.hold(HoldDatasetRequest(user="job", dataset=other))
        await datasets.delete_dataset("two")
        assert await rows_of(datasets, other) == [{"n": 1}]
        await datasets.release(ReleaseDatasetsRequest(user="job"))
        with pytest.raises(InvalidRequestError):
            await rows_of(datasets, other)

    async def test_a_dataset_in_use_cannot_be_deleted(self, datasets: Datasets) -> None:
        """409 that names who uses it, until all of them have released it."""
        for user in ("job 1", "job 2", "job 1"):
            await datasets.hold(HoldDatasetRequest(user=user, dataset=PRIMES))
        with pytest.raises(ConflictError, match=r"job 1.*job 2"):
            await datasets.delete_dataset("primes")
        await datasets.release(ReleaseDatasetsRequest(user="job 1"))
        await datasets.release(ReleaseDatasetsRequest(user="job 1"))
        with pytest.raises(ConflictError, match="job 2"):
            await datasets.delete_dataset("primes")
        assert await datasets.get_dataset("primes") == PRIMES
        await datasets.release(ReleaseDatasetsRequest(user="job 2"))
        await datasets.delete_dataset("primes")

    async def test_everything_is_there_after_a_restart(self, tmp_path: Path) -> None:
        """Descriptions, stored rows and holds."""
        folder = tmp_path / "restarted"
        async with self.open(folder) as datasets:
            await datasets.create_dataset(CreateDatasetRequest(uuid="primes", dataset=PRIMES))
            request = StoreDatasetRequest(uuid="mine", columns={"n": ColumnKind.NUMBER}, rows=[{"n": 1}])
            mine = await datasets.store(request)
            await datasets.hold(HoldDatasetRequest(user="job", dataset=PRIMES))
        async with self.open(folder) as datasets:
            assert await datasets.get_dataset("primes") == PRIMES
            assert await rows_of(datasets, await datasets.get_dataset("mine")) == [{"n": 1}]
            assert await datasets.store(request) == mine
            with pytest.raises(ConflictError, match="job"):
                await datasets.delete_dataset("primes")
            await datasets.release(ReleaseDatasetsRequest(user="job"))
            await datasets.delete_dataset("primes")
        async with self.open(folder) as datasets:
            assert await ids_of(datasets) == ["mine"]

    async def test_of_several_that_create_the_same_id_one_succeeds(self, datasets: Datasets) -> None:
        """And those that lost are told."""

        async def create(n: int) -> bool:
            request = StoreDatasetRequest(uuid="wanted", columns={"n": ColumnKind.NUMBER}, rows=[{"n": n % 4}])
            try:
                await datasets.store(request)
            except AlreadyExistsError:
                return False
            return True

        done = await asyncio.gather(*(create(n) for n in range(12)))
        winners = {n % 4 for n, is_done in enumerate(done) if is_done}
        assert len(winners) == 1
        assert await rows_of(datasets, await datasets.get_dataset("wanted")) == [{"n": winners.pop()}]

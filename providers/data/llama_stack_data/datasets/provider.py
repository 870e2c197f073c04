"""The provider ``datasets``: descriptions in the store, rows read from where they are."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator

from llama_stack.apis import Datasets
from llama_stack.apis.datasets import (
    CreateDatasetRequest,
    Dataset,
    HoldDatasetRequest,
    NamedDataset,
    ReadDatasetRequest,
    ReleaseDatasetsRequest,
    StoreDatasetRequest,
)

from .content import Content, stored_url
from .rows import Row, RowCheck, RowReader, Span
from .store import DatasetStore


class DatasetsProvider(Datasets):
    """Datasets of one stack."""

    def __init__(self, store: DatasetStore, content: Content, reader: RowReader) -> None:
        self._store = store
        self._content = content
        self._reader = reader

    async def owns(self, resource: str) -> bool:
        return await self._store.contains(resource)

    async def create_dataset(self, request: CreateDatasetRequest) -> None:
        await self._store.add(request.uuid, request.dataset)

    async def get_dataset(self, dataset_id: str) -> Dataset:
        return await self._store.get(dataset_id)

    async def delete_dataset(self, dataset_id: str) -> None:
        await self._store.remove(dataset_id)

    async def list_datasets(self) -> AsyncIterator[NamedDataset]:
        return self._store.all()

    async def read(self, request: ReadDatasetRequest) -> AsyncIterator[Row]:
        return self._rows(request)

    async def _rows(self, request: ReadDatasetRequest) -> AsyncGenerator[Row, None]:
        dataset = request.dataset
        async with self._content.open(dataset.content_url) as (file, form):
            rows = self._reader.rows(file, form, dataset.columns, Span(request.offset, request.limit))
            try:
                async for row in rows:
                    yield row
            finally:
                await rows.aclose()

    async def store(self, request: StoreDatasetRequest) -> Dataset:
        rows = await asyncio.to_thread(_written, request)
        url = stored_url(hashlib.sha256(rows).hexdigest())
        dataset = Dataset(columns=request.columns, content_url=url, metadata=request.metadata)
        await self._store.add(request.uuid, dataset, rows)
        return dataset

    async def hold(self, request: HoldDatasetRequest) -> None:
        await self._store.hold(request.user, request.dataset)

    async def release(self, request: ReleaseDatasetsRequest) -> None:
        await self._store.release(request.user)


def _written(request: StoreDatasetRequest) -> bytes:
    """The rows as JSON lines. Raises ``InvalidRequestError`` for one that does not fit the columns."""
    check = RowCheck(request.columns)
    lines = []
    for number, row in enumerate(request.rows, 1):
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(
            "utf-8", "surrogatepass"
        )
        check.check(line, number)
        lines.append(line + b"\n")
    return b"".join(lines)

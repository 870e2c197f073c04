"""Datasets in the database: descriptions by id, who holds which, and the blobs of those whose rows are kept here.

Two descriptions are the same when their canonical JSON is. A blob lives as long as a description that names it is
registered or held.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from llama_stack.apis.datasets import Dataset, NamedDataset
from llama_stack.errors import AlreadyExistsError, ConflictError, NotFoundError
from llama_stack.storage import Blobs, Database, Migration

from .content import stored_digest

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

PAGE = 100
"""How many descriptions a list reads at a time; one may hold a ``data:`` URL of megabytes."""
SHOWN_HOLDERS = 3
MIGRATIONS = [
    Migration(
        number=1,
        description="datasets, and who holds them",
        statements=[
            "CREATE TABLE {datasets} (uuid TEXT PRIMARY KEY, digest TEXT NOT NULL, body TEXT NOT NULL, blob TEXT)",
            "CREATE INDEX {datasets_blob} ON {datasets} (blob)",
            "CREATE TABLE {holds} (holder TEXT NOT NULL, digest TEXT NOT NULL, blob TEXT,"
            " PRIMARY KEY (holder, digest))",
            "CREATE INDEX {holds_digest} ON {holds} (digest)",
            "CREATE INDEX {holds_blob} ON {holds} (blob)",
        ],
    )
]


def digest_of(dataset: Dataset) -> str:
    """What tells a description from others: the SHA-256 of its JSON, the order of whose keys says nothing."""
    canonical = json.dumps(dataset.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


class DatasetStore:
    """The datasets of one provider."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database = database
        self._blobs = blobs

    async def add(self, uuid: str, dataset: Dataset, rows: bytes | None = None) -> None:
        """Register a dataset, and keep its rows where they are given; the same again is nothing new.

        Raises ``AlreadyExistsError`` for another one of its id.
        """
        sql, digest, blob = self._database.sql, digest_of(dataset), stored_digest(dataset.content_url)
        async with self._database.write() as connection:
            found = await connection.scalar(sql("SELECT digest FROM {datasets} WHERE uuid = :uuid"), {"uuid": uuid})
            if found is not None and found != digest:
                raise AlreadyExistsError("dataset", uuid, param="uuid")
            if rows is not None:
                await self._blobs.put(rows, max_bytes=max(len(rows), 1))
            if found is None:
                await connection.execute(
                    sql("INSERT INTO {datasets} (uuid, digest, body, blob) VALUES (:uuid, :digest, :body, :blob)"),
                    {"uuid": uuid, "digest": digest, "body": dataset.model_dump_json(), "blob": blob},
                )

    async def get(self, uuid: str) -> Dataset:
        """The dataset of that id. Raises ``NotFoundError``."""
        async with self._database.read() as connection:
            statement = self._database.sql("SELECT body FROM {datasets} WHERE uuid = :uuid")
            found = await connection.scalar(statement, {"uuid": uuid})
        if found is None:
            raise _unknown(uuid)
        return Dataset.model_validate_json(found)

    async def contains(self, uuid: str) -> bool:
        """Whether a dataset of that id is registered."""
        async with self._database.read() as connection:
            statement = self._database.sql("SELECT 1 FROM {datasets} WHERE uuid = :uuid")
            return await connection.scalar(statement, {"uuid": uuid}) is not None

    async def remove(self, uuid: str) -> None:
        """Forget a dataset, and its rows where nobody else names them.

        Raises ``NotFoundError``, and ``ConflictError`` while somebody holds it.
        """
        sql = self._database.sql
        async with self._database.write(frees_space=True) as connection:
            found = (
                await connection.execute(sql("SELECT digest, blob FROM {datasets} WHERE uuid = :uuid"), {"uuid": uuid})
            ).first()
            if found is None:
                raise _unknown(uuid)
            statement = sql("SELECT holder FROM {holds} WHERE digest = :digest ORDER BY holder")
            holders = list(await connection.scalars(statement, {"digest": found.digest}))
            if holders:
                more = f" and {len(holders) - SHOWN_HOLDERS} more" if len(holders) > SHOWN_HOLDERS else ""
                shown = ", ".join(repr(holder) for holder in holders[:SHOWN_HOLDERS])
                raise ConflictError(
                    f"dataset {uuid!r} is in use by {shown}{more}; delete it when they are done, or cancel them",
                    param="dataset_id",
                    extra={"holders": holders[:SHOWN_HOLDERS]},
                )
            await connection.execute(sql("DELETE FROM {datasets} WHERE uuid = :uuid"), {"uuid": uuid})
        await self._collect(found.blob)

    async def all(self) -> AsyncIterator[NamedDataset]:
        """All datasets, by id."""
        last = ""
        while True:
            async with self._database.read() as connection:
                statement = self._database.sql(
                    "SELECT uuid, body FROM {datasets} WHERE uuid > :last ORDER BY uuid LIMIT :page"
                )
                page = (await connection.execute(statement, {"last": last, "page": PAGE})).all()
            for found in page:
                yield NamedDataset(uuid=found.uuid, dataset=Dataset.model_validate_json(found.body))
            if len(page) < PAGE:
                return
            last = page[-1].uuid

    async def hold(self, holder: str, dataset: Dataset) -> None:
        """Keep whatever is described so, and its rows, until ``release``; holding it already is nothing new."""
        sql, digest, blob = self._database.sql, digest_of(dataset), stored_digest(dataset.content_url)
        values = {"holder": holder, "digest": digest, "blob": blob}
        async with self._database.write() as connection:
            await connection.execute(
                sql(
                    "INSERT INTO {holds} (holder, digest, blob) VALUES (:holder, :digest, :blob)"
                    " ON CONFLICT (holder, digest) DO NOTHING"
                ),
                values,
            )

    async def release(self, holder: str) -> None:
        """Give back all that somebody holds."""
        sql, values = self._database.sql, {"holder": holder}
        async with self._database.write(frees_space=True) as connection:
            statement = sql("SELECT DISTINCT blob FROM {holds} WHERE holder = :holder AND blob IS NOT NULL")
            blobs = list(await connection.scalars(statement, values))
            await connection.execute(sql("DELETE FROM {holds} WHERE holder = :holder"), values)
        for blob in blobs:
            await self._collect(blob)

    async def sweep(self) -> None:
        """Remove blobs that no description names, which a process that was killed can leave behind."""
        await self._blobs.sweep()
        there = await self._blobs.digests()
        async with self._database.read() as connection:
            statement = "SELECT blob FROM {datasets} WHERE blob IS NOT NULL UNION SELECT blob FROM {holds}"
            named = set(await connection.scalars(self._database.sql(statement)))
        for digest in there:
            if digest not in named:
                await self._collect(digest)

    async def _collect(self, blob: str | None) -> None:
        """Delete a blob unless it is named; in a block of its own, so that nobody names it meanwhile."""
        if blob is None:
            return
        async with self._database.write(frees_space=True) as connection:
            if not await self._is_named(connection, blob):
                await self._blobs.delete(blob)

    async def _is_named(self, connection: AsyncConnection, blob: str) -> bool:
        statement = self._database.sql(
            "SELECT 1 FROM {datasets} WHERE blob = :blob UNION ALL SELECT 1 FROM {holds} WHERE blob = :blob"
        )
        return (await connection.execute(statement, {"blob": blob})).first() is not None


def _unknown(uuid: str) -> NotFoundError:
    return NotFoundError(f"dataset {uuid!r} does not exist here", param="dataset_id")

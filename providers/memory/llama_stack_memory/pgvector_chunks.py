"""Chunks in PostgreSQL: vectors in a column of pgvector's type, words as ``tsvector``; the server searches.

Every process sees one database, so there is nothing to keep up to date here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from llama_stack.apis.filters import Condition
from llama_stack.apis.memory_banks import IndexKind
from llama_stack.storage import Database

from .banks import Bank, read_same_bank
from .documents import Prepared
from .interfaces import Found, Values, Vectors
from .tables import CHUNK_BITS, among_sql, select

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

# BM25 (Robertson and Zaragoza 2009) with the constants of SQLite's FTS5. A chunk that has one of the words is in
# 'matched', so that the chunks there that have a word are all that have it.
_BM25 = """
WITH sought AS (
    SELECT lexeme FROM unnest(to_tsvector('english', CAST(:text AS text)))
), matched AS (
    SELECT id, words, size FROM {chunks}
    WHERE bank = :bank AND words @@ (SELECT string_agg(quote_literal(lexeme), ' | ')::tsquery FROM sought)
), times AS (
    SELECT m.id, m.size, w.lexeme, cardinality(w.positions) AS times
    FROM matched m CROSS JOIN unnest(m.words) w WHERE w.lexeme IN (SELECT lexeme FROM sought)
), bank AS (
    SELECT count(*) AS chunks, avg(size) AS size FROM {chunks} WHERE bank = :bank
), weights AS (
    SELECT lexeme, greatest(ln((chunks - count(*) + 0.5) / (count(*) + 0.5)), 0.000001) AS weight
    FROM times CROSS JOIN bank GROUP BY lexeme, chunks
)
SELECT t.id AS chunk,
    CAST(sum(weight * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * t.size / bank.size))) AS float) AS score
FROM times t JOIN weights USING (lexeme) CROSS JOIN bank
WHERE true {among} GROUP BY t.id HAVING count(*) >= :least ORDER BY score DESC, t.id LIMIT :k
"""


class PgvectorChunks:
    """See ``banks.Chunks``."""

    kinds = (IndexKind.EXACT,)

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, connection: AsyncConnection, bank: Bank, documents: Sequence[tuple[int, Prepared]]) -> None:
        """Write the chunks of documents, each with its number."""
        rows = [
            {"id": (number << CHUNK_BITS) + n, "bank": bank.id, "text": chunk.text, "vector": _as_text(vector_D)}
            for number, prepared in documents
            for n, (chunk, vector_D) in enumerate(zip(prepared.chunks, prepared.vectors_CD, strict=True))
        ]
        if rows:
            statement = self._database.sql(
                "INSERT INTO {chunks} SELECT :id, :bank, text, to_tsvector('english', text),"
                " (SELECT coalesce(sum(cardinality(positions)), 0) FROM unnest(to_tsvector('english', text))),"
                " CAST(CAST(:vector AS text) AS vector) FROM (SELECT CAST(:text AS text) AS text) AS given"
            )
            await connection.execute(statement, rows)

    async def remove(self, connection: AsyncConnection, documents: Sequence[int]) -> None:
        """Remove the chunks of documents, given by their numbers."""
        ranges = [{"first": n << CHUNK_BITS, "beyond": (n + 1) << CHUNK_BITS} for n in documents]
        if ranges:
            statement = self._database.sql("DELETE FROM {chunks} WHERE id >= :first AND id < :beyond")
            await connection.execute(statement, ranges)

    async def written(self, bank: Bank, removed: Sequence[int], added: Sequence[tuple[int, Prepared]]) -> None:
        """Nothing is kept here."""

    def dropped(self, bank: Bank) -> None:
        """Nothing is kept here."""

    @asynccontextmanager
    async def search(self, bank: Bank) -> AsyncIterator[PgvectorSearch]:
        """The bank as it is now. Raises ``NotFoundError`` and ``ConflictError`` where it is no more."""
        async with self._database.read() as connection:
            yield PgvectorSearch(self._database, connection, await read_same_bank(connection, self._database, bank))


class PgvectorSearch:
    """See ``banks.Search``."""

    def __init__(self, database: Database, connection: AsyncConnection, bank: Bank) -> None:
        self._database = database
        self._connection = connection
        self._bank = bank

    async def by_vector(self, vector_D: Vectors, k: int, condition: Condition | None) -> list[Found]:
        """The chunks most similar to a vector of length 1. All vectors in the bank have that length too."""
        return await self._found(
            "SELECT id AS chunk, -(vector <#> CAST(CAST(:vector AS text) AS vector)) AS score FROM {chunks}"
            " WHERE bank = :bank {among} ORDER BY score DESC, id LIMIT :k",
            {"k": k, "vector": _as_text(vector_D)},
            condition,
            "id",
        )

    async def by_words(self, words: Sequence[str], least: int, k: int, condition: Condition | None) -> list[Found]:
        """The chunks that fit the words best by BM25; a chunk needs ``least`` of them."""
        return await self._found(_BM25, {"k": k, "least": least, "text": " ".join(words)}, condition, "t.id")

    async def listed(self, k: int, condition: Condition | None) -> list[Found]:
        """The first chunks of the bank, in the order of their coming, with a score of 0."""
        sql = "SELECT id AS chunk, 0.0 AS score FROM {chunks} WHERE bank = :bank {among} ORDER BY id LIMIT :k"
        return await self._found(sql, {"k": k}, condition, "id")

    async def texts(self, chunks: Sequence[int]) -> dict[int, tuple[str, str, str]]:
        """For each chunk its document's id, its text, and the document's metadata as JSON."""
        from sqlalchemy import bindparam

        statement = self._database.sql(
            "SELECT c.id, d.uuid, c.text, d.metadata FROM {chunks} c"
            f" JOIN {{documents}} d ON d.id = c.id >> {CHUNK_BITS} WHERE c.id IN :chunks"
        ).bindparams(bindparam("chunks", expanding=True))
        rows = await self._connection.execute(statement, {"chunks": list(chunks)})
        return {id: (uuid, text, metadata) for id, uuid, text, metadata in rows}

    async def _found(self, sql: str, values: Values, condition: Condition | None, chunk: str) -> list[Found]:
        """What a statement finds in the bank; ``{among}`` in it stands for the condition, on the column ``chunk``."""
        values["bank"] = self._bank.id
        sql = sql.replace("{among}", among_sql(chunk, condition, values))
        rows = await select(self._connection, self._database, sql, values)
        return [Found(row.chunk, float(row.score)) for row in rows]


def _as_text(vector_D: Vectors) -> str:
    """A vector as pgvector reads it, to the last bit."""
    return f"[{','.join(map(repr, vector_D.tolist()))}]"

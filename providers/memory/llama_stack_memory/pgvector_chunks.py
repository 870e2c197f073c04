"""Chunks in PostgreSQL: vectors in a column of pgvector's type, words as ``tsvector``; the server searches.

Every process sees one database, so there is nothing to keep up to date here. A bank of kind ``hnsw`` has an index of
its own, over its rows only, which pgvector keeps in the transaction of each write. It serves what faiss's graph serves
on SQLite: searches by vector without a filter, in banks that are not small; all others compare every vector.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from llama_stack.apis.filters import Condition
from llama_stack.apis.memory_banks import IndexKind
from llama_stack.errors import InvalidRequestError, TooLargeError
from llama_stack.storage import Database

from .banks import Bank, read_same_bank
from .documents import Prepared
from .interfaces import Found, Hit, Values, Vectors
from .sought import ByVector, ByWords, Listed, Ranking, Sought
from .tables import CHUNK_BITS, among_sql, select, words_and_size
from .words import plain_words

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

# BM25 (Robertson and Zaragoza 2009) with the constants of SQLite's FTS5. A chunk that has one of the words is in
# 'matched', so that the chunks there that have a word are all that have it. 'said' is how many words of the query have
# a stem: each of them counts, as there. There each chunk has one word more, which says whose it is.
_BM25 = """
WITH sought AS (
    SELECT lexeme, cardinality(positions) AS said FROM unnest(to_tsvector('{words}', CAST(:text AS text)))
), matched AS (
    SELECT id, words, size FROM {chunks}
    WHERE bank = :bank AND words @@ (SELECT string_agg(quote_literal(lexeme), ' | ')::tsquery FROM sought)
), times AS (
    SELECT m.id, m.size, s.lexeme, s.said, cardinality(w.positions) AS times
    FROM matched m CROSS JOIN unnest(m.words) w JOIN sought s ON s.lexeme = w.lexeme
), bank AS (
    SELECT count(*) AS chunks, avg(size) AS size FROM {chunks} WHERE bank = :bank
), weights AS (
    SELECT lexeme, greatest(ln((chunks - count(*) + 0.5) / (count(*) + 0.5)), 0.000001) AS weight
    FROM times CROSS JOIN bank GROUP BY lexeme, chunks
)
SELECT t.id AS chunk,
    CAST(sum(said * weight * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * (t.size + 1) / (bank.size + 1)))) AS float)
    AS score
FROM times t JOIN weights USING (lexeme) CROSS JOIN bank
WHERE true {among} GROUP BY t.id HAVING sum(said) >= (SELECT ceil(CAST(:share AS float) * sum(said)) FROM sought)
ORDER BY score DESC, t.id LIMIT :k
"""

# The server knows from the numbers in it which index serves this, so both are part of the statement.
_WALK = """
SELECT id AS chunk, -(vector <#> CAST(CAST(:vector AS text) AS vector)) AS score FROM (
    SELECT id, vector FROM {chunks} WHERE bank = BANK
    ORDER BY CAST(vector AS vector(DIMENSIONS)) <#> CAST(CAST(:vector AS text) AS vector(DIMENSIONS)) LIMIT :near
) AS near ORDER BY score DESC, id LIMIT :k
"""

GRAPHS_SINCE = (0, 8)
"""The version of pgvector whose walks go on until they have as many hits as are wanted."""
# For the length of the transaction. To the server a comparison of vectors costs what one of numbers does, so that it
# would sort all rows of a bank rather than walk.
_WALKING = """
SELECT set_config('hnsw.ef_search', :width, true), set_config('hnsw.iterative_scan', 'strict_order', true),
    set_config('enable_sort', 'off', true)
"""

LINKS, BUILD_WIDTH = 16, 200
"""How many links a row of a graph has, and how far it is walked to find them: pgvector's m and ef_construction."""
WIDTH = 400
"""How far a search walks, at least: pgvector's ef_search."""
MAX_HITS = 250
"""For more hits than these every vector is compared: pgvector walks no farther than a thousand rows."""
SMALL_ROWS = 16_384
"""In fewer rows than this every vector is compared: in 6,000 rows that took less than half the time of a walk."""
MAX_GRAPH_DIMENSIONS = 2000
_TOO_MANY_WORDS = "54000"
"""The server's code for a ``tsvector`` beyond its limit of a megabyte."""


class PgvectorChunks:
    """See ``banks.Chunks``."""

    def __init__(self, database: Database, *, has_graphs: bool) -> None:
        self.kinds = (IndexKind.EXACT, IndexKind.HNSW) if has_graphs else (IndexKind.EXACT,)
        self._database = database

    @staticmethod
    async def on(database: Database) -> PgvectorChunks:
        """Chunks on a server, with graphs where its pgvector has them."""
        async with database.read() as connection:
            sql = database.sql("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
            version: str = await connection.scalar(sql) or "0"
        return PgvectorChunks(database, has_graphs=tuple(map(int, version.split(".")[:2])) >= GRAPHS_SINCE)

    async def prepare(self, connection: AsyncConnection, bank: Bank) -> None:
        """Make the bank's graph. Raises ``InvalidRequestError`` for vectors that are too long for one."""
        if bank.kind == IndexKind.HNSW:
            if bank.dimensions > MAX_GRAPH_DIMENSIONS:
                raise InvalidRequestError(
                    f"index: {bank.model} has {bank.dimensions} dimensions, and pgvector's hnsw takes"
                    f" {MAX_GRAPH_DIMENSIONS}; ask for exact",
                    param="index",
                )
            await connection.exec_driver_sql(
                self._database.expand(
                    f"CREATE INDEX {{{_graph(bank)}}} ON {{chunks}}"
                    f" USING hnsw (CAST(vector AS vector({bank.dimensions:d})) vector_ip_ops)"
                    f" WITH (m = {LINKS}, ef_construction = {BUILD_WIDTH}) WHERE bank = {bank.id:d}"
                )
            )

    async def discard(self, connection: AsyncConnection, bank: Bank) -> None:
        """Remove the bank's graph."""
        if bank.kind == IndexKind.HNSW:
            await connection.exec_driver_sql(self._database.expand(f"DROP INDEX {{{_graph(bank)}}}"))

    async def add(self, connection: AsyncConnection, bank: Bank, documents: Sequence[tuple[int, Prepared]]) -> None:
        """Write the chunks of documents, each with its number.

        Raises ``TooLargeError`` for a chunk with more words than the server can index.
        """
        rows = [
            {
                "id": (number << CHUNK_BITS) + n,
                "bank": bank.id,
                "text": chunk.text,
                "vector": _as_text(vector_D),
                **words_and_size(chunk.text),
            }
            for number, prepared in documents
            for n, (chunk, vector_D) in enumerate(zip(prepared.chunks, prepared.vectors_CD, strict=True))
        ]
        if rows:
            from sqlalchemy.exc import DBAPIError

            statement = self._database.sql(
                "INSERT INTO {chunks} (id, bank, text, words, size, vector) VALUES (:id, :bank, :text,"
                " to_tsvector('{words}', :words), :size, CAST(CAST(:vector AS text) AS vector))"
            )
            try:
                await connection.execute(statement, rows)
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) != _TOO_MANY_WORDS:
                    raise
                raise TooLargeError(
                    "a chunk has more different words than PostgreSQL indexes; this text needs a bank of smaller chunks"
                ) from error

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

    async def find(self, bank: Bank, sought: Sought) -> list[Hit]:
        """See ``banks.Chunks``."""
        async with self.search(bank) as search:
            found = sought.joined([await search.ranked(ranking, sought.condition) for ranking in sought.rankings])
            texts = await search.texts([hit.chunk for hit in found])
        return [Hit(*texts[hit.chunk], hit.score) for hit in found]

    @asynccontextmanager
    async def search(self, bank: Bank) -> AsyncIterator[PgvectorSearch]:
        """The bank as it is now. Raises ``NotFoundError`` and ``ConflictError`` where it is no more."""
        async with self._database.read() as connection:
            now = await read_same_bank(connection, self._database, bank)
            has_graph = now.kind == IndexKind.HNSW and IndexKind.HNSW in self.kinds
            yield PgvectorSearch(self._database, connection, now, has_graph=has_graph)


class PgvectorSearch:
    """One state of one bank, to search in."""

    def __init__(self, database: Database, connection: AsyncConnection, bank: Bank, *, has_graph: bool = False) -> None:
        self._database = database
        self._connection = connection
        self._bank = bank
        self._has_graph = has_graph

    async def ranked(self, ranking: Ranking, condition: Condition | None) -> list[Found]:
        """What one ranking finds among the chunks of documents that meet the condition."""
        match ranking:
            case ByVector(vector_D, k):
                return await self.by_vector(vector_D, k, condition)
            case ByWords(words, share, k):
                return await self.by_words(words, share, k, condition)
            case Listed(k):
                return await self.listed(k, condition)

    async def by_vector(self, vector_D: Vectors, k: int, condition: Condition | None) -> list[Found]:
        """The chunks most similar to a vector of length 1. All vectors in the bank have that length too."""
        if self._has_graph and condition is None and k <= MAX_HITS and await self._has_many_rows():
            found = await self._walk(vector_D, k)
            if len(found) == k:
                return found  # fewer would mean that the graph leads nowhere from where the walk was
        return await self._found(
            "SELECT id AS chunk, -(vector <#> CAST(CAST(:vector AS text) AS vector)) AS score FROM {chunks}"
            " WHERE bank = :bank {among} ORDER BY score DESC, id LIMIT :k",
            {"k": k, "vector": _as_text(vector_D)},
            condition,
            "id",
        )

    async def by_words(self, words: Sequence[str], share: float, k: int, condition: Condition | None) -> list[Found]:
        """The chunks that fit the words best by BM25; a chunk needs that share of them, and one at least."""
        values = {"k": k, "share": share, "text": plain_words(" ".join(words))}
        return await self._found(_BM25, values, condition, "t.id")

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

    async def _walk(self, vector_D: Vectors, k: int) -> list[Found]:
        """The hits along the graph: of twice as many as are wanted, for equal scores are put in order by id."""
        await self._connection.execute(self._database.sql(_WALKING), {"width": str(max(WIDTH, 2 * k))})
        values = {"k": k, "near": 2 * k, "vector": _as_text(vector_D)}
        found = await self._found(walk_sql(self._bank), values, None, "id")
        await self._connection.execute(self._database.sql("SELECT set_config('enable_sort', 'on', true)"))
        return found

    async def _has_many_rows(self) -> bool:
        statement = self._database.sql(
            "SELECT count(*) FROM (SELECT 1 FROM {chunks} WHERE bank = :bank LIMIT :many) AS rows"
        )
        rows: int | None = await self._connection.scalar(statement, {"bank": self._bank.id, "many": SMALL_ROWS})
        return rows == SMALL_ROWS

    async def _found(self, sql: str, values: Values, condition: Condition | None, chunk: str) -> list[Found]:
        """What a statement finds in the bank; ``{among}`` in it stands for the condition, on the column ``chunk``."""
        values["bank"] = self._bank.id
        sql = sql.replace("{among}", among_sql(chunk, condition, values))
        rows = await select(self._connection, self._database, sql, values)
        return [Found(row.chunk, float(row.score)) for row in rows]


def walk_sql(bank: Bank) -> str:
    """The search along the graph of a bank."""
    return _WALK.replace("BANK", str(bank.id)).replace("DIMENSIONS", str(bank.dimensions))


def _graph(bank: Bank) -> str:
    """The name of the index of a bank's vectors."""
    return f"graph_{bank.id:d}"


def _as_text(vector_D: Vectors) -> str:
    """A vector as pgvector reads it, to the last bit."""
    return f"[{','.join(map(repr, vector_D.tolist()))}]"

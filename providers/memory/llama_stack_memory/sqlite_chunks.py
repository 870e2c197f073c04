"""Chunks in SQLite: vectors as BLOBs with an index of each bank in memory, texts in FTS5.

The index follows the table. Each bank has a revision that every write raises; a search reads it in the transaction in
which it reads the hits, and first brings the index to that revision where it is not there. So whatever wrote (this
process, one before it, another one beside it), a search sees what is committed and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_stack.apis.filters import Condition
from llama_stack.apis.memory_banks import IndexKind
from llama_stack.errors import ConflictError, NotFoundError, StackError
from llama_stack.storage import Database
from llama_stack.storage.cancellation import in_thread

from .banks import Bank, read_same_bank
from .documents import Prepared
from .interfaces import Found, Hit, Values, Vectors
from .sought import ByVector, ByWords, Listed, Ranking, Sought
from .tables import CHUNK_BITS, among_sql, condition_sql
from .vectors import ExactIndex, HnswIndex, has_faiss

if TYPE_CHECKING:
    import sqlite3

    from sqlalchemy.ext.asyncio import AsyncConnection

logger = logging.getLogger(__name__)

LOAD_ROWS = 4096
"""Vectors read in one go when an index is brought up to date."""
_UNKNOWN = -1
"""The revision of an index that was not made, or not finished."""


@dataclass(eq=False)
class _Index:
    """The index of one bank, whose lock whoever looks at it holds."""

    vectors: ExactIndex | HnswIndex
    revision: int = _UNKNOWN
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class SqliteChunks:
    """See ``banks.Chunks``."""

    def __init__(self, database: Database) -> None:
        self.kinds = (IndexKind.EXACT, IndexKind.HNSW) if has_faiss() else (IndexKind.EXACT,)
        self._database = database
        self._indexes: dict[int, _Index] = {}

    async def prepare(self, connection: AsyncConnection, bank: Bank) -> None:
        """An index is made when it is first searched."""

    async def discard(self, connection: AsyncConnection, bank: Bank) -> None:
        """An index is forgotten when the bank is gone, by ``dropped``."""

    async def add(self, connection: AsyncConnection, bank: Bank, documents: Sequence[tuple[int, Prepared]]) -> None:
        """Write the chunks of documents, each with its number."""
        vectors, texts = [], []
        for number, prepared in documents:
            for n, (chunk, vector_D) in enumerate(zip(prepared.chunks, prepared.vectors_CD, strict=True)):
                id = (number << CHUNK_BITS) + n
                vectors.append((id, bank.id, vector_D.tobytes()))
                texts.append((id, _bank_word(bank), chunk.text))
        if vectors:
            # As the driver takes them: these are the rows of which there are many.
            expand = self._database.expand
            await connection.exec_driver_sql(expand("INSERT INTO {chunks} VALUES (?, ?, ?)"), vectors)
            await connection.exec_driver_sql(expand("INSERT INTO {texts} (rowid, bank, text) VALUES (?, ?, ?)"), texts)

    async def remove(self, connection: AsyncConnection, documents: Sequence[int]) -> None:
        """Remove the chunks of documents, given by their numbers."""
        if not documents:
            return
        ranges = [{"first": n << CHUNK_BITS, "beyond": (n + 1) << CHUNK_BITS} for n in documents]
        sql = self._database.sql
        await connection.execute(sql("DELETE FROM {chunks} WHERE id >= :first AND id < :beyond"), ranges)
        await connection.execute(sql("DELETE FROM {texts} WHERE rowid >= :first AND rowid < :beyond"), ranges)

    async def written(self, bank: Bank, removed: Sequence[int], added: Sequence[tuple[int, Prepared]]) -> None:
        """Bring the index to the revision that a write has just made of ``bank``, if nothing else came between."""
        index = self._index(bank)
        async with index.lock:
            if index.revision == bank.revision:
                index.revision = _UNKNOWN
                await in_thread(_apply, index.vectors, removed, added)
                index.revision = bank.revision + 1

    def dropped(self, bank: Bank) -> None:
        """Forget the index of a bank that is no more."""
        self._indexes.pop(bank.id, None)

    async def load(self) -> None:
        """Bring the index of every bank up to date, so that no search has to."""
        async with self._database.read() as connection:
            rows = (await connection.execute(self._database.sql("SELECT * FROM {banks} ORDER BY id"))).all()
        for bank in [Bank(**row._mapping) for row in rows]:
            try:
                index = self._index(bank)
                async with index.lock:
                    await self._bring_up(bank, index)
            except StackError as error:  # dropped meanwhile, or the store is in trouble, which a search will tell
                logger.warning("bank %r is not loaded: %s", bank.uuid, error)

    async def find(self, bank: Bank, sought: Sought) -> list[Hit]:
        """See ``banks.Chunks``."""
        index = self._index(bank)
        search = partial(_find, self._database, bank, index, sought)
        async with index.lock:
            while (hits := await self._database.read_at_once(search)) is None:
                await self._bring_up(bank, index)
        return hits

    def _index(self, bank: Bank) -> _Index:
        if bank.id not in self._indexes:
            # Without the library a bank that was made for a graph finds more than it has to, only slower.
            has_graph = bank.kind == IndexKind.HNSW and IndexKind.HNSW in self.kinds
            vectors = HnswIndex(bank.dimensions) if has_graph else ExactIndex(bank.dimensions)
            self._indexes[bank.id] = _Index(vectors)
        return self._indexes[bank.id]

    async def _bring_up(self, bank: Bank, index: _Index) -> None:
        """Bring an index to the revision of its bank. Raises as ``find`` does."""
        async with self._database.read() as connection:
            try:
                now = await read_same_bank(connection, self._database, bank)
            except (NotFoundError, ConflictError):
                self.dropped(bank)  # by another process perhaps, which cannot tell this one
                raise
            index.revision = _UNKNOWN  # a cancellation may leave it anywhere between
            sql = self._database.sql
            found = await connection.execute(
                sql("SELECT id FROM {chunks} WHERE bank = :bank ORDER BY id"), {"bank": bank.id}
            )
            ids = np.array(found.scalars().all(), dtype=np.int64)
            index.vectors.remove(np.setdiff1d(index.vectors.ids, ids))
            missing = np.setdiff1d(ids, index.vectors.ids)
            statement = sql(
                "SELECT id, vector FROM {chunks} WHERE bank = :bank AND id BETWEEN :first AND :last ORDER BY id"
            )
            for start in range(0, len(missing), LOAD_ROWS):
                wanted = missing[start : start + LOAD_ROWS]
                values = {"bank": bank.id, "first": int(wanted[0]), "last": int(wanted[-1])}
                rows = {row.id: row.vector for row in await connection.execute(statement, values)}
                vectors = np.frombuffer(b"".join(rows[id] for id in wanted.tolist()), np.float32)
                await in_thread(index.vectors.add, wanted, vectors.reshape(len(wanted), bank.dimensions))
            index.revision = now.revision


def _find(
    database: Database, bank: Bank, index: _Index, sought: Sought, connection: sqlite3.Connection
) -> list[Hit] | None:
    """What is sought, or ``None`` where the index is not at the revision of the bank, or the bank is no more."""
    sql = database.expand("SELECT id, revision FROM {banks} WHERE uuid = ?")
    if connection.execute(sql, (bank.uuid,)).fetchone() != (bank.id, index.revision):
        return None
    return _Search(database, connection, bank, index.vectors, sought.condition).hits(sought)


class _Search:
    """One state of one bank, to search in among the chunks of documents that meet a condition.

    It blocks, so all of it is used in one thread.
    """

    def __init__(
        self,
        database: Database,
        connection: sqlite3.Connection,
        bank: Bank,
        vectors: ExactIndex | HnswIndex,
        condition: Condition | None,
    ) -> None:
        self._database = database
        self._connection = connection
        self._vectors = vectors
        self._bank = bank
        self._condition = condition

    def hits(self, sought: Sought) -> list[Hit]:
        """What is sought, best first."""
        found = sought.joined([self._ranked(ranking) for ranking in sought.rankings])
        sql = self._database.expand(
            "SELECT d.uuid, t.text, d.metadata FROM {texts} t, {documents} d WHERE t.rowid = ? AND d.id = ?"
        )
        hits = []
        for hit in found:
            (shown,) = self._connection.execute(sql, (hit.chunk, hit.chunk >> CHUNK_BITS))
            document, text, metadata = shown
            hits.append(Hit(document, text, metadata, hit.score))
        return hits

    def _ranked(self, ranking: Ranking) -> list[Found]:
        match ranking:
            case ByVector(vector_D, k):
                return self._by_vector(vector_D, k)
            case ByWords(words, share, k):
                return self._by_words(words, share, k)
            case Listed(k):
                return self._listed(k)

    def _by_vector(self, vector_D: Vectors, k: int) -> list[Found]:
        is_allowed = None
        if self._condition is not None:
            values: Values = {"bank": self._bank.id}
            where = condition_sql(self._condition, values)
            rows = self._select(f"SELECT d.id FROM {{documents}} d WHERE d.bank = :bank AND {where}", values)
            documents = np.fromiter((id for (id,) in rows), np.int64)
            is_allowed = np.isin(self._vectors.ids >> CHUNK_BITS, documents)
        ids, scores = self._vectors.search(vector_D, k, is_allowed)
        return [Found(*found) for found in zip(ids.tolist(), scores.tolist(), strict=True)]

    def _by_words(self, words: Sequence[str], share: float, k: int) -> list[Found]:
        least = ceil(share * len(words))
        values: Values = {"bank": self._bank.id, "match": _match(self._bank, words), "k": k}
        enough = self._enough(words, least, values) if least > 1 else ""
        rows = self._select(
            "SELECT rowid, -bm25({texts}, 0.0, 1.0) AS score FROM {texts} WHERE {texts} MATCH :match"
            f" {enough} {among_sql('rowid', self._condition, values)} ORDER BY score DESC, rowid LIMIT :k",
            values,
        )
        return [Found(chunk, score) for chunk, score in rows]

    def _enough(self, words: Sequence[str], least: int, values: Values) -> str:
        """SQL, from AND on, that holds for texts with ``least`` of the words; FTS5 only knows one of them, or all."""
        matches = {f"word_{n}": _match(self._bank, [word]) for n, word in enumerate(words)}
        values |= {**matches, "least": least}
        each = (f"SELECT rowid AS chunk FROM {{texts}} WHERE {{texts}} MATCH :{name}" for name in matches)
        return f"AND rowid IN (SELECT chunk FROM ({' UNION ALL '.join(each)}) GROUP BY chunk HAVING count(*) >= :least)"

    def _listed(self, k: int) -> list[Found]:
        values: Values = {"bank": self._bank.id, "k": k}
        among = among_sql("id", self._condition, values)
        rows = self._select(f"SELECT id FROM {{chunks}} WHERE bank = :bank {among} ORDER BY id LIMIT :k", values)
        return [Found(chunk, 0.0) for (chunk,) in rows]

    def _select(self, sql: str, values: Values) -> list[tuple[Any, ...]]:
        return self._connection.execute(self._database.expand(sql), values).fetchall()


def _match(bank: Bank, words: Sequence[str]) -> str:
    """What FTS5 looks for: a text of the bank that has one of the words."""
    quoted = " OR ".join(f'"{word}"' for word in words)
    return f"bank : {_bank_word(bank)} AND text : ({quoted})"


def _bank_word(bank: Bank) -> str:
    """A word that marks the texts of one bank."""
    return f"bank{bank.id}"


def _apply(vectors: ExactIndex | HnswIndex, removed: Sequence[int], added: Sequence[tuple[int, Prepared]]) -> None:
    vectors.remove(vectors.ids[np.isin(vectors.ids >> CHUNK_BITS, removed)])
    if added:
        ids = [(number << CHUNK_BITS) + np.arange(len(prepared.chunks)) for number, prepared in added]
        vectors.add(np.concatenate(ids), np.concatenate([prepared.vectors_CD for _, prepared in added]))

"""The tables of both stores, and the conditions of the filter language as SQL over them.

Banks and documents are numbered by ``numbers``, which gives none twice. A chunk's number is made of its document's, so
that the one tells the other.
Metadata that filters can reach lies a second time in ``attributes``, as the bytes that ``filters.sort_key`` gives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_stack.apis.filters import Comparison, Condition, Every, Not
from llama_stack.storage import Database, Migration

from .interfaces import Values
from .words import plain_words

if TYPE_CHECKING:
    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

CHUNK_BITS = 20
MAX_CHUNKS = 1 << CHUNK_BITS
"""The most chunks of one document."""

MAX_NAME_BYTES = 1000

SQLITE_MIGRATIONS = (
    Migration(
        number=1,
        description="banks, documents, chunks",
        statements=(
            "CREATE TABLE {numbers} (next INTEGER NOT NULL)",
            "INSERT INTO {numbers} VALUES (1)",
            "CREATE TABLE {banks} (id INTEGER PRIMARY KEY, uuid TEXT NOT NULL UNIQUE, name TEXT NOT NULL,"
            " model TEXT NOT NULL, dimensions INTEGER NOT NULL, chunk_tokens INTEGER NOT NULL,"
            " chunk_overlap INTEGER NOT NULL, kind TEXT NOT NULL, request BLOB NOT NULL, revision INTEGER NOT NULL)",
            "CREATE TABLE {documents} (id INTEGER PRIMARY KEY, bank INTEGER NOT NULL, uuid TEXT NOT NULL,"
            " mime_type TEXT NOT NULL, metadata TEXT NOT NULL, content BLOB NOT NULL, UNIQUE (bank, uuid))",
            "CREATE TABLE {attributes} (document INTEGER NOT NULL, name BLOB NOT NULL, value BLOB NOT NULL,"
            " PRIMARY KEY (document, name)) WITHOUT ROWID",
            "CREATE TABLE {chunks} (id INTEGER PRIMARY KEY, bank INTEGER NOT NULL, vector BLOB NOT NULL)",
            "CREATE INDEX {chunks_by_bank} ON {chunks} (bank)",
            # The chunks' texts lie in it too. Its column 'bank' holds the word that _bank_word makes.
            "CREATE VIRTUAL TABLE {texts} USING fts5(bank, text, tokenize = 'porter unicode61')",
        ),
    ),
)


async def _count_every_word(connection: AsyncConnection, database: Database) -> None:
    """Words as SQLite's FTS5 has them: all of them, and none is an address or a number with a sign (``words.py``)."""
    for statement in (
        "CREATE TEXT SEARCH DICTIONARY {stems} (TEMPLATE = snowball, LANGUAGE = porter)",  # without stop words
        "CREATE TEXT SEARCH CONFIGURATION {words} (PARSER = default)",
        "ALTER TEXT SEARCH CONFIGURATION {words} ADD MAPPING FOR asciiword, word WITH {stems}",
        "ALTER TEXT SEARCH CONFIGURATION {words}"
        " ADD MAPPING FOR numword, uint, sfloat, int, float, version WITH simple",
    ):
        await connection.exec_driver_sql(database.expand(statement))
    some = database.sql("SELECT id, text FROM {chunks} WHERE id > :last ORDER BY id LIMIT 1000")
    change = database.sql("UPDATE {chunks} SET words = to_tsvector('{words}', :words), size = :size WHERE id = :id")
    last = -1
    while rows := (await connection.execute(some, {"last": last})).all():
        await connection.execute(change, [{"id": row.id, **words_and_size(row.text)} for row in rows])
        last = rows[-1].id


POSTGRESQL_MIGRATIONS = (
    Migration(
        number=1,
        description="banks, documents, chunks",
        statements=(
            "CREATE EXTENSION IF NOT EXISTS vector",
            "CREATE TABLE {numbers} (next BIGINT NOT NULL)",
            "INSERT INTO {numbers} VALUES (1)",
            "CREATE TABLE {banks} (id BIGINT PRIMARY KEY, uuid TEXT NOT NULL UNIQUE, name TEXT NOT NULL,"
            " model TEXT NOT NULL, dimensions INTEGER NOT NULL, chunk_tokens INTEGER NOT NULL,"
            " chunk_overlap INTEGER NOT NULL, kind TEXT NOT NULL, request BYTEA NOT NULL, revision BIGINT NOT NULL)",
            "CREATE TABLE {documents} (id BIGINT PRIMARY KEY, bank BIGINT NOT NULL, uuid TEXT NOT NULL,"
            " mime_type TEXT NOT NULL, metadata TEXT NOT NULL, content BYTEA NOT NULL, UNIQUE (bank, uuid))",
            "CREATE TABLE {attributes} (document BIGINT NOT NULL, name BYTEA NOT NULL, value BYTEA NOT NULL,"
            " PRIMARY KEY (document, name))",
            # Vectors of several models lie in one column. 'size' is the number of words that 'words' holds.
            "CREATE TABLE {chunks} (id BIGINT PRIMARY KEY, bank BIGINT NOT NULL, text TEXT NOT NULL,"
            " words TSVECTOR NOT NULL, size INTEGER NOT NULL, vector VECTOR NOT NULL)",
            "CREATE INDEX {chunks_by_bank} ON {chunks} (bank, size)",
            "CREATE INDEX {chunks_by_word} ON {chunks} USING gin (words)",
        ),
    ),
    Migration(number=2, description="every word of a chunk counts", run=_count_every_word),
)


def words_and_size(text: str) -> Values:
    """What the columns ``words`` and ``size`` of PostgreSQL's chunks are made of."""
    words = plain_words(text)
    return {"words": words, "size": len(words.split())}


def attribute_name(key: str) -> bytes:
    """A key of metadata as ``attributes`` has it: itself, or a hash of one that is longer than an index takes."""
    name = key.encode("utf-8", "surrogatepass")
    return name if len(name) <= MAX_NAME_BYTES else b"\xff" + hashlib.sha256(name).digest()  # no text begins so


def condition_sql(condition: Condition, values: Values) -> str:
    """SQL that holds for the rows of ``{documents} d`` that meet the condition; its values are put into ``values``."""
    if isinstance(condition, Comparison):
        return _comparison_sql(condition, values)
    if isinstance(condition, Not):
        return f"NOT ({condition_sql(condition.condition, values)})"
    is_every = isinstance(condition, Every)
    parts = [f"({condition_sql(part, values)})" for part in condition.conditions]
    return (" AND " if is_every else " OR ").join(parts) or ("1 = 1" if is_every else "1 = 0")


def among_sql(chunk: str, condition: Condition | None, values: Values) -> str:
    """SQL, from AND on, that holds for chunks of documents of ``:bank`` that meet the condition."""
    if condition is None:
        return ""
    where = condition_sql(condition, values)
    return f"AND {chunk} >> {CHUNK_BITS} IN (SELECT d.id FROM {{documents}} d WHERE d.bank = :bank AND {where})"


async def select(connection: AsyncConnection, database: Database, sql: str, values: Values) -> Sequence[Row[Any]]:
    """The rows of a statement that holds a condition.

    It is not kept, as ``Database.sql`` would keep it: a filter may have any of endlessly many shapes.
    """
    from sqlalchemy import text

    return (await connection.execute(text(database.expand(sql)), values)).all()


def _comparison_sql(comparison: Comparison, values: Values) -> str:
    number = len(values)
    names = {part: f"{part}_{number}" for part in ("name", "value", "least", "beyond")}
    kind = comparison.value[0]
    operator = {"eq": "=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}[comparison.operator]
    values |= {
        names["name"]: attribute_name(comparison.key),
        names["value"]: comparison.value,
        names["least"]: bytes([kind]),
        names["beyond"]: bytes([kind + 1]),
    }
    return (
        f"EXISTS (SELECT 1 FROM {{attributes}} a WHERE a.document = d.id AND a.name = :{names['name']}"
        f" AND a.value {operator} :{names['value']}"
        f" AND a.value >= :{names['least']} AND a.value < :{names['beyond']})"
    )

"""Memory banks beside what one would use instead: search, recall, insert, memory, and a query over HTTP.

    python benchmarks/memory.py                          # 100,000 chunks of 384 dimensions, top 10
    python benchmarks/memory.py --rows 20000 --data uniform --sides numpy,exact

Each side runs in a process of its own, one after the other, over the same vectors and queries; its peak memory is that
process' own, less what it had before the vectors were made. ``--data`` is ``clusters`` (a thousand of them),
``uniform`` (all directions alike) or ``duplicates`` (ten nearly the same of each). A query's time is the median over
all of them; recall counts hits that score no less than the tenth best, but for rounding. A side that is named more than
once is measured as often, and its middle rate counts.

sqlite-vec (through apsw) and chromadb run in an environment of their own, ``peers`` inside of ours, where there is one
(``make bench-memory`` makes it): chromadb brings an event loop that would make another server of what is measured over
HTTP. What is not installed is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

Vectors = NDArray[Any]
Search = Callable[[Vectors], Sequence[int]]

DIMENSIONS, HITS, QUERIES = 384, 10, 200
CLUSTERS = 1000
SEARCH_SIDES = ("numpy", "exact", "faiss-flat", "sqlite-vec", "hnsw", "faiss-hnsw", "chromadb")
INSERT_SIDES = ("insert", "insert-sqlite-vec")
SIDES = (*SEARCH_SIDES, *INSERT_SIDES, "http")
DEFAULT_SIDES = (*SEARCH_SIDES, *3 * INSERT_SIDES, "http")  # a disk is not as steady as a processor
PEERS = Path(sys.prefix) / "peers" / "bin" / "python"
AMONG_PEERS = ("sqlite-vec", "insert-sqlite-vec", "chromadb")
GOALS = (
    ("exact", "numpy", 1.4, "exact search"),
    ("exact", "sqlite-vec", 12.0, "exact search"),
    ("hnsw", "faiss-hnsw", 0.9, "search by a graph"),
    ("hnsw", "chromadb", 8.0, "search by a graph"),
    ("insert", "insert-sqlite-vec", 0.5, "persisted insert"),
)


@dataclass
class Measured:
    """What one side did."""

    side: str
    build_seconds: float = 0.0
    rate: float = 0.0
    """Queries a second, or chunks inserted."""
    recall: float = 0.0
    peak_bytes: int = 0
    """Beyond what the process had before the vectors were made; the vectors themselves are part of it."""
    note: str = ""


def unit(vectors: Vectors) -> Vectors:
    scaled: Vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def make_data(kind: str, rows: int) -> tuple[Vectors, Vectors]:
    """Vectors and queries, always the same ones."""
    random = np.random.default_rng(1)
    centres = random.standard_normal((CLUSTERS if kind == "clusters" else max(rows // 10, 1), DIMENSIONS))
    spread = {"clusters": 0.3, "duplicates": 0.01, "uniform": 1.0}[kind]

    def some(count: int) -> Vectors:
        middle = 0 if kind == "uniform" else centres[random.integers(0, len(centres), count)]
        return middle + spread * random.standard_normal((count, DIMENSIONS), dtype=np.float32)

    vectors = np.empty((rows, DIMENSIONS), np.float32)
    for first in range(0, rows, 1000):
        vectors[first : first + 1000] = unit(some(min(1000, rows - first)))
    return vectors, unit(some(QUERIES))


def by_numpy(vectors: Vectors) -> Search:
    def search(query: Vectors) -> Sequence[int]:
        scores = vectors @ query
        best = np.argpartition(scores, -HITS)[-HITS:]
        return best[np.argsort(-scores[best])].tolist()  # type: ignore[no-any-return]

    return search


def by_ours(vectors: Vectors, kind: str) -> Search:
    from llama_stack_memory.vectors import ExactIndex, HnswIndex

    index = ExactIndex(DIMENSIONS) if kind == "exact" else HnswIndex(DIMENSIONS)
    for first in range(0, len(vectors), 4096):
        part = vectors[first : first + 4096]
        index.add(np.arange(first, first + len(part)), part)
    return lambda query: index.search(query, HITS)[0].tolist()


def by_faiss(vectors: Vectors, kind: str) -> Search:
    faiss: Any = import_module("faiss")
    if kind == "faiss-flat":
        index = faiss.IndexFlatIP(DIMENSIONS)
    else:
        index = faiss.IndexHNSWFlat(DIMENSIONS, 16, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 200, 64
    index.add(vectors)
    return lambda query: index.search(query[None], HITS)[1][0].tolist()


def open_sqlite_vec(folder: str) -> Any:
    connection = import_module("apsw").Connection(f"{folder}/vectors.sqlite")
    connection.enable_load_extension(True)
    connection.load_extension(import_module("sqlite_vec").loadable_path())
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"CREATE VIRTUAL TABLE v USING vec0(vector float[{DIMENSIONS}] distance_metric=cosine)")
    return connection


def fill_sqlite_vec(connection: Any, vectors: Vectors) -> None:
    for first in range(0, len(vectors), 1000):
        part = vectors[first : first + 1000]
        with connection:
            rows = ((first + n, vector.tobytes()) for n, vector in enumerate(part))
            connection.executemany("INSERT INTO v(rowid, vector) VALUES (?, ?)", rows)


def by_sqlite_vec(vectors: Vectors, folder: str) -> Search:
    connection = open_sqlite_vec(folder)
    fill_sqlite_vec(connection, vectors)
    sql = f"SELECT rowid FROM v WHERE vector MATCH ? AND k = {HITS} ORDER BY distance"
    return lambda query: [row[0] for row in connection.execute(sql, (query.tobytes(),))]


def by_chromadb(vectors: Vectors, folder: str) -> Search:
    client = import_module("chromadb").PersistentClient(folder)
    bank = client.create_collection("bank", metadata={"hnsw:space": "ip", "hnsw:M": 16, "hnsw:search_ef": 64})
    for first in range(0, len(vectors), 5000):
        part = vectors[first : first + 5000]
        bank.add(ids=[str(first + n) for n in range(len(part))], embeddings=part)
    return lambda query: [int(id) for id in bank.query(query_embeddings=query[None], n_results=HITS)["ids"][0]]


def searcher(side: str, vectors: Vectors, folder: str) -> Search:
    if side == "numpy":
        return by_numpy(vectors)
    if side in ("exact", "hnsw"):
        return by_ours(vectors, side)
    if side.startswith("faiss"):
        return by_faiss(vectors, side)
    return by_sqlite_vec(vectors, folder) if side == "sqlite-vec" else by_chromadb(vectors, folder)


def measure_search(side: str, kind: str, rows: int, folder: str) -> Measured:
    before = peak_bytes()
    vectors, queries = make_data(kind, rows)
    least = [np.partition(vectors @ query, -HITS)[-HITS] - 1e-5 for query in queries]
    started = time.perf_counter()
    search = searcher(side, vectors, folder)
    built = time.perf_counter() - started
    for query in queries[:5]:
        search(query)
    seconds, hits = [], 0
    for query, bound in zip(queries, least, strict=True):
        started = time.perf_counter()
        found = search(query)
        seconds.append(time.perf_counter() - started)
        hits += int((vectors[found] @ query >= bound).sum())
    # The caller's own copy of the vectors is not the side's.
    peak = peak_bytes() - before - (0 if side == "numpy" else vectors.nbytes)
    return Measured(side, built, 1 / median(seconds), hits / (HITS * len(queries)), peak)


PASSAGE = "A passage of sixteen words, which is short for a chunk, and whose last one is number {}."


class GivenEmbedder:
    """Knows the vectors of its passages, so that an insert is measured and not a model."""

    name, dimensions, max_tokens = "given", DIMENSIONS, 1000

    def __init__(self, vectors: Vectors) -> None:
        self._vectors = vectors

    def embed(self, texts: Sequence[str]) -> Vectors:
        return self._vectors[[int(text.split()[-1].strip(".")) for text in texts]]

    def token_spans(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"\S+", text)]


async def fill_bank(folder: Path, vectors: Vectors) -> float:
    """Put documents of twenty chunks into the store of ``folder``, fifty a request; returns the seconds it took."""
    from llama_stack_memory import MemoryConfig
    from llama_stack_memory.banks import DatabaseBanks
    from llama_stack_memory.extraction import Extractor
    from llama_stack_memory.sqlite_chunks import SqliteChunks
    from llama_stack_memory.tables import SQLITE_MIGRATIONS

    from llama_stack.apis.memory_banks import MemoryBankDocument
    from llama_stack.storage import open_store

    config = MemoryConfig(embedder="builtin:hashing")
    async with open_store("sqlite", folder) as store:
        database = store.database("memory_banks.sqlite")
        await database.migrate(SQLITE_MIGRATIONS)
        banks = DatabaseBanks(
            database, SqliteChunks(database), Extractor(config.documents), [GivenEmbedder(vectors)], config
        )
        await banks.create("b", "B", [], chunk_tokens=len(PASSAGE.split()), chunk_overlap=0)
        started = time.perf_counter()
        for first in range(0, len(vectors), 1000):
            starts = range(first, min(first + 1000, len(vectors)), 20)
            texts = {n: " ".join(PASSAGE.format(m) for m in range(n, min(n + 20, len(vectors)))) for n in starts}
            documents = [
                MemoryBankDocument(uuid=str(n), content=text.encode(), mime_type="text/plain", metadata={})
                for n, text in texts.items()
            ]
            await banks.insert("b", documents)
        seconds = time.perf_counter() - started
        async with database.read() as connection:
            assert await connection.scalar(database.sql("SELECT count(*) FROM {chunks}")) == len(vectors)
        return seconds


def measure_insert(side: str, kind: str, rows: int, folder: str) -> Measured:
    vectors, _ = make_data(kind, rows)
    if side == "insert":
        seconds = asyncio.run(fill_bank(Path(folder), vectors))
        return Measured(side, rate=rows / seconds, note="documents, texts, full text and vectors")
    connection = open_sqlite_vec(folder)
    started = time.perf_counter()
    fill_sqlite_vec(connection, vectors)
    return Measured(side, rate=rows / (time.perf_counter() - started), note="vectors alone")


ECHO = """
from fastapi import FastAPI, Request
from llama_stack.apis.memory_banks import QueryHit, QueryRequest, QueryResponse
app = FastAPI()
HITS = [QueryHit(document_uuid=str(n), text=f"Passage number {n}", score=0.5, metadata={}) for n in range(10)]
@app.post("/memory_bank/query")
async def query(request: Request) -> QueryResponse:
    QueryRequest.model_validate_json(await request.body())
    return QueryResponse(hits=HITS)
"""


def measure_http(kind: str, rows: int, folder: str) -> Measured:
    """A query with an embedding over HTTP, beside an echo by FastAPI of a request and an answer of the same size."""
    vectors, queries = make_data(kind, rows)
    search = by_ours(vectors, "exact")
    bare = median_seconds(lambda query: search(query), queries)
    home = Path(folder)
    asyncio.run(fill_bank(home / "bench", vectors))
    (home / "bench.yaml").write_text(
        "version: 1\nname: bench\nproviders:\n  memory_banks:\n    - provider: sqlite\n"
        "      config: { embedder: 'builtin:hashing' }\nserver: { port: 0 }\n"
    )
    (home / "echo.py").write_text(ECHO)
    commands = {
        "echo": [sys.executable, "-m", "uvicorn", "echo:app", "--port", "0", "--no-access-log"],
        "ours": [str(Path(sys.executable).with_name("llama-stack")), "run", str(home / "bench.yaml"), "--port", "0"],
    }
    seconds = {name: over_http(command, home, queries) for name, command in commands.items()}
    allowed = seconds["echo"] + 2 * bare
    note = (
        f"bare query {bare * 1e3:.2f} ms, echo {seconds['echo'] * 1e3:.2f} ms, ours {seconds['ours'] * 1e3:.2f} ms,"
        f" goal {allowed * 1e3:.2f} ms: {'met' if seconds['ours'] <= allowed else 'not met'}"
    )
    return Measured("http", rate=1 / seconds["ours"], note=note)


def over_http(command: list[str], home: Path, queries: Vectors) -> float:
    """The median seconds of a query to the server that a command starts."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "LLAMA_STACK_HOME": str(home), "PYTHONPATH": str(home)}
    server = subprocess.Popen(
        command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert server.stdout is not None
    try:
        line = next(line for line in server.stdout if "http://127.0.0.1:" in line)
        threading.Thread(target=server.stdout.read, daemon=True).start()  # so that its log never fills the pipe
        port = int(line.split("http://127.0.0.1:")[1].split()[0].split("/")[0])
        connection = HTTPConnection("127.0.0.1", port)

        def ask(query: Vectors) -> None:
            body = json.dumps({"bank_uuid": "b", "embedding": query.tolist(), "k": HITS, "mode": "vector"})
            connection.request("POST", "/memory_bank/query", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
            assert response.status == 200, answer
            assert len(answer["hits"]) == HITS

        return median_seconds(ask, queries)
    finally:
        server.terminate()
        server.wait()


def median_seconds(call: Callable[[Vectors], object], queries: Vectors) -> float:
    seconds = []
    for query in [*queries[:5], *queries]:
        started = time.perf_counter()
        call(query)
        seconds.append(time.perf_counter() - started)
    return median(seconds[5:])


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_side(arguments: argparse.Namespace) -> Measured:
    threadpool_limits(arguments.threads, "blas")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.side == "http":
            return measure_http(arguments.data, arguments.rows, folder)
        measure = measure_insert if arguments.side.startswith("insert") else measure_search
        return measure(arguments.side, arguments.data, arguments.rows, folder)


def run_all(arguments: argparse.Namespace) -> None:
    vector_bytes = arguments.rows * DIMENSIONS * 4
    print(f"{arguments.rows} vectors of {DIMENSIONS} dimensions, {arguments.data}, top {HITS}")
    print(f"{'side':20}{'build s':>9}{'a second':>11}{'recall':>8}{'memory':>8}")
    rates: dict[str, list[float]] = {}
    for side in arguments.sides.split(","):
        options = ["--rows", str(arguments.rows), "--data", arguments.data, "--threads", str(arguments.threads)]
        python = str(PEERS) if side in AMONG_PEERS and PEERS.exists() else sys.executable
        command = [python, __file__, "--side", side, *options]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode != 0:
            print(f"{side:20}  left out: {ran.stderr.strip().splitlines()[-1]}")
            continue
        measured = Measured(**json.loads(ran.stdout.splitlines()[-1]))
        rates.setdefault(side, []).append(measured.rate)
        memory = f"{measured.peak_bytes / vector_bytes:8.2f}" if measured.peak_bytes else " " * 8
        recall = f"{measured.recall:8.4f}" if measured.recall else " " * 8
        row = f"{side:20}{measured.build_seconds:9.1f}{measured.rate:11.1f}{recall}{memory}  {measured.note}"
        print(row.rstrip(), flush=True)
    for ours, theirs, goal, what in GOALS:
        if ours in rates and theirs in rates:
            factor = median(rates[ours]) / median(rates[theirs])
            print(f"{what}: {factor:.2f}x {theirs}, goal {goal}x: {'met' if factor >= goal else 'not met'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--data", choices=["clusters", "uniform", "duplicates"], default="clusters")
    parser.add_argument("--sides", default=",".join(DEFAULT_SIDES), help="which, and in which order")
    parser.add_argument("--threads", type=int, default=2, help="of numpy's matrix library")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(asdict(run_side(arguments))))
    else:
        run_all(arguments)


if __name__ == "__main__":
    main()

"""The graph finds what the exact search finds, or gives way to it."""

from __future__ import annotations

import numpy as np
import pytest
from llama_stack_memory.interfaces import Vectors
from llama_stack_memory.vectors import ExactIndex, HnswIndex, has_faiss, hnsw

from tests.providers.memory.test_exact_index import data, unit

pytestmark = pytest.mark.skipif(not has_faiss(), reason="faiss-cpu is not installed")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph from 500 rows on, so that the tests need no more."""
    monkeypatch.setattr(hnsw, "SMALL_ROWS", 500)


def both(vectors: Vectors) -> tuple[HnswIndex, ExactIndex]:
    ids = np.random.default_rng(1).permutation(len(vectors)).astype(np.int64)
    graph, exact = HnswIndex(vectors.shape[1]), ExactIndex(vectors.shape[1])
    for index in (graph, exact):
        for first in range(0, len(ids), 300):
            index.add(ids[first : first + 300], vectors[first : first + 300])
    return graph, exact


def recall(graph: HnswIndex, exact: ExactIndex, queries: Vectors, k: int = 10) -> float:
    hits = 0
    for query in queries:
        least = exact.search(query, k)[1][-1]
        ids, scores = graph.search(query, k)
        assert len(set(ids.tolist())) == len(ids) <= k
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)
        hits += int((scores >= least - 1e-6).sum())
    return hits / (k * len(queries))


@pytest.mark.parametrize("kind", ["clusters", "uniform", "near-duplicates", "duplicates", "spiky"])
def test_it_finds_nearly_everything_on_any_data(kind: str) -> None:
    """On clusters by its graph; on data that misleads a walk by whatever it takes. 1,000 hits are looked for."""
    graph, exact = both(data(kind, 3000, 48, seed=2))
    queries = unit(data(kind, 3000, 48, seed=2)[:100] + 0.01 * data("uniform", 100, 48, seed=3))
    assert recall(graph, exact, queries) >= 0.99


def test_it_walks_its_graph_where_that_works() -> None:
    """Otherwise the test above would only compare the exact search with itself."""
    graph, _ = both(data("clusters", 3000, 48, seed=2))
    assert graph._width is not None


def test_scores_and_order_are_those_of_the_exact_search() -> None:
    """The graph proposes; what is said of a hit is computed in full."""
    graph, exact = both(data("clusters", 2000, 48, seed=4))
    query = unit(np.ones(48))
    ids, scores = graph.search(query, 5)
    expected = dict(zip(*(found.tolist() for found in exact.search(query, 2000)), strict=True))
    assert scores.tolist() == [expected[id] for id in ids.tolist()]


def test_what_was_removed_is_never_found_and_the_graph_is_built_anew() -> None:
    """The library cannot delete; a hit that is gone must not take the place of one that is there either."""
    vectors = data("clusters", 3000, 48, seed=5)
    graph, exact = both(vectors)
    for share in (0.3, 0.5, 0.9):
        gone = graph.ids[: int(len(graph) * share)].copy()
        for index in (graph, exact):
            index.remove(gone)
        assert not set(gone.tolist()) & {id for q in vectors[:50] for id in graph.search(q, 20)[0].tolist()}
        assert recall(graph, exact, vectors[:100]) >= 0.99
    assert len(graph._ids_R) <= max(2 * len(graph), 500)
    graph.add(np.array([10**6]), unit(np.ones((1, 48))))
    assert graph.search(unit(np.ones(48)), 1)[0].tolist() == [10**6]


def test_a_condition_is_searched_exactly() -> None:
    """A walk that may step only on few rows loses its way."""
    graph, exact = both(data("clusters", 2000, 48, seed=6))
    allowed = graph.ids % 50 == 0
    query = unit(np.ones(48))
    assert graph.search(query, 10, allowed)[0].tolist() == exact.search(query, 10, exact.ids % 50 == 0)[0].tolist()

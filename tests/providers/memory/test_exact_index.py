"""The fast search gives what comparing every row gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_stack_memory.interfaces import Vectors
from llama_stack_memory.vectors import ExactIndex, exact
from llama_stack_memory.vectors.native import scan
from numpy.typing import NDArray


def unit(vectors: NDArray[Any]) -> Vectors:
    scaled: Vectors = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    return scaled


def expected(vectors: Vectors, ids: NDArray[np.int64], query: Vectors, k: int) -> tuple[list[int], list[float]]:
    scores = np.einsum("nd,d->n", vectors.astype(np.float64), query.astype(np.float64))  # equal rows score equally
    order = np.lexsort((ids, -scores))[:k]
    return ids[order].tolist(), scores[order].tolist()


def data(kind: str, count: int, dimensions: int, seed: int) -> Vectors:
    random = np.random.default_rng(seed)
    noise = random.standard_normal((count, dimensions))
    if kind == "uniform":
        return unit(noise)
    if kind == "clusters":
        return unit(random.standard_normal((20, dimensions))[random.integers(0, 20, count)] + 0.1 * noise)
    if kind == "near-duplicates":
        return unit(random.standard_normal((3, dimensions))[random.integers(0, 3, count)] + 1e-6 * noise)
    if kind == "duplicates":
        return unit(random.standard_normal((3, dimensions))[random.integers(0, 3, count)])
    return unit(noise**9)  # one large number among small ones, which 8 bits carry worst


@pytest.fixture(params=["compiled", "numpy"])
def scanning(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to scan."""
    if request.param == "numpy":
        monkeypatch.setattr(exact, "scan", lambda: None)
    elif scan() is None:
        pytest.skip("there is no C compiler on this machine")


@pytest.mark.parametrize("kind", ["uniform", "clusters", "near-duplicates", "duplicates", "spiky"])
@pytest.mark.parametrize("dimensions", [1, 7, 384, 1500])
def test_the_best_are_those_of_comparing_every_row(
    kind: str, dimensions: int, scanning: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recall is 1 on any data: what the codes leave out is bounded, not hoped to be small."""
    monkeypatch.setattr(exact, "BLOCK_ROWS", 512)
    vectors = data(kind, 1300, dimensions, seed=dimensions)
    ids = np.random.default_rng(1).permutation(10 * len(vectors))[: len(vectors)].astype(np.int64)
    index = ExactIndex(dimensions)
    index.add(ids, vectors)
    queries = [vectors[5], unit(vectors[1:2] - 2 * vectors[3:4])[0], data("spiky", 1, dimensions, seed=9)[0]]
    for query in (query for query in queries if np.isfinite(query).all()):
        for k in (1, 10, 100, len(vectors), 10**6):
            found, scores = index.search(query, k)
            wanted, exact_scores = expected(vectors, ids, query, k)
            assert found.tolist() == wanted
            assert scores.tolist() == pytest.approx(exact_scores, abs=1e-12)


def test_only_allowed_rows_are_found(scanning: None) -> None:
    """And the best of them, however few or bad they are."""
    vectors = data("clusters", 9000, 32, seed=3)
    ids = np.arange(9000, dtype=np.int64)
    index = ExactIndex(32)
    index.add(ids, vectors)
    for allowed in (ids % 7 == 0, ids == 4000, ids < 0, ids >= 0):
        found, _ = index.search(vectors[1], 10, allowed)
        assert found.tolist() == expected(vectors[allowed], ids[allowed], vectors[1], 10)[0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(1, 30)), max_size=20), st.integers(0, 2**32 - 1)
)
def test_after_any_changes_it_holds_what_was_added_and_not_removed(
    changes: list[tuple[bool, int, int]], seed: int
) -> None:
    """Rows move when others go; none may be lost, doubled or mixed up. Blocks of few rows show that soonest."""
    random = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "BLOCK_ROWS", 8)
        index, model = ExactIndex(4), dict[int, Vectors]()
        for is_addition, first, count in changes:
            ids = np.array([id for id in range(first, first + count) if (id in model) != is_addition], np.int64)
            if is_addition:
                vectors = unit(random.standard_normal((len(ids), 4)))
                index.add(ids, vectors)
                model.update(zip(ids.tolist(), vectors, strict=True))
            else:
                index.remove(np.concatenate([ids, np.array([999])]))
                for id in ids.tolist():
                    del model[id]
        assert sorted(index.ids.tolist()) == sorted(model)
        if model:
            held = np.array(list(model), np.int64)
            query = unit(random.standard_normal(4))
            wanted, _ = expected(np.stack(list(model.values())), held, query, 5)
            assert index.search(query, 5)[0].tolist() == wanted


def test_an_empty_index_finds_nothing() -> None:
    """A bank begins so."""
    found, scores = ExactIndex(8).search(unit(np.ones(8)), 5)
    assert (len(found), len(scores)) == (0, 0)

"""Approximate search among vectors of length 1: a graph is walked (HNSW, arXiv:1603.09320), which faiss keeps.

It stands on an ``ExactIndex``. The graph holds the vectors in 16 bits and proposes twice the hits that are wanted;
their scores are computed in full. How far it is walked is found by trial: as it grows, the index searches for some of
its own rows both ways and takes the narrowest walk that misses next to nothing. Where none does, because the data has
no neighbourhoods to walk along, where rows are few, and under a condition, the exact search is the faster one and is
used.

The graph has no deletion: a removed row is skipped, and when most are, the graph is built anew.
"""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..interfaces import Vectors
from .exact import ExactIndex, Ids, Mask

LINKS, BUILD_WIDTH = 16, 200
"""How many links a row has, and how far the graph is walked to find them: faiss's M and efConstruction."""
WIDTHS = (64, 128, 256, 512)
"""How far a search may walk: faiss's efSearch."""
SMALL_ROWS = 4096
"""Fewer rows than this are compared one by one."""
TRIALS, TRIAL_HITS, WANTED_RECALL = 64, 20, 0.995
_SAME = 1e-5
"""Scores that differ by less count as equal in a trial."""

logger = logging.getLogger(__name__)


def has_faiss() -> bool:
    """Whether the library is installed."""
    return find_spec("faiss") is not None


def _faiss() -> Any:
    """The library, which is loaded with the first graph; its types do not know all that it has."""
    return import_module("faiss")


class HnswIndex:
    """The same as ``ExactIndex``: faster on many rows, and a hit is missing now and then."""

    def __init__(self, dimensions: int) -> None:
        self._exact = ExactIndex(dimensions)
        self._dimensions = dimensions
        self._selector: tuple[NDArray[np.uint8], Any] | None = None
        self._start_graph()

    def __len__(self) -> int:
        return len(self._exact)

    @property
    def ids(self) -> Ids:
        """The ids that it holds; good until the next change."""
        return self._exact.ids

    def add(self, ids_A: Ids, vectors_AD: Vectors) -> None:
        """Add vectors under ids that it does not hold."""
        self._exact.add(ids_A, vectors_AD)
        self._grow_graph(ids_A, vectors_AD)

    def remove(self, ids: Ids) -> None:
        """Remove those of the ids that it holds."""
        self._exact.remove(ids)
        self._ids_R[np.isin(self._ids_R, ids)] = _GONE
        self._selector = None
        if len(self._ids_R) > max(2 * len(self), SMALL_ROWS):
            self._start_graph()
            for ids_A, vectors_AD in self._exact.rows():
                self._grow_graph(ids_A, vectors_AD)

    def search(self, query_D: Vectors, k: int, is_allowed_N: Mask | None = None) -> tuple[Ids, NDArray[np.float64]]:
        """The ids of the ``k`` rows that are most similar to ``query_D``, now and then without one, and their scores.

        Best first, equal ones by id. ``is_allowed_N`` says for each of ``ids`` whether it may be found.
        """
        if is_allowed_N is not None or self._width is None:
            return self._exact.search(query_D, k, is_allowed_N)
        return self._exact.best(self._walk(query_D, 2 * k, self._width), query_D, k)

    def _start_graph(self) -> None:
        faiss = _faiss()
        half = faiss.ScalarQuantizer.QT_fp16
        self._graph = faiss.IndexHNSWSQ(self._dimensions, half, LINKS, faiss.METRIC_INNER_PRODUCT)
        self._graph.hnsw.efConstruction = BUILD_WIDTH
        self._graph.is_trained = True  # 16-bit floats have nothing to be trained
        self._ids_R: Ids = np.empty(0, np.int64)
        """By row of the graph."""
        self._selector = None
        self._width: int | None = None
        """How far to walk, or None where every row is compared."""
        self._tuned_rows = 0

    def _grow_graph(self, ids_A: Ids, vectors_AD: Vectors) -> None:
        self._graph.add(np.ascontiguousarray(vectors_AD))
        self._ids_R = np.concatenate([self._ids_R, ids_A])
        self._selector = None
        if len(self) >= max(SMALL_ROWS, 2 * self._tuned_rows):
            self._tune()

    def _walk(self, query_D: Vectors, count: int, width: int) -> Ids:
        """The ids of rows near to the query, at most ``count``."""
        faiss = _faiss()
        parameters = faiss.SearchParametersHNSW(efSearch=max(width, count))
        if len(self._ids_R) > len(self):
            if self._selector is None:
                bits = np.packbits(self._ids_R != _GONE, bitorder="little")  # faiss reads them where they lie
                self._selector = bits, faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
            parameters.sel = self._selector[1]
        _, rows_1C = self._graph.search(query_D[None], count, params=parameters)
        found: Ids = self._ids_R[rows_1C[0][rows_1C[0] >= 0]]
        return found

    def _tune(self) -> None:
        """Find the narrowest walk that misses next to nothing, for rows as queries."""
        self._tuned_rows = len(self)
        trials = [(query_D, self._exact.search(query_D, TRIAL_HITS)[1][-1]) for query_D in self._exact.sample(TRIALS)]
        for width in WIDTHS:
            hits = 0
            for query_D, least in trials:
                _, scores = self._exact.best(self._walk(query_D, 2 * TRIAL_HITS, width), query_D, TRIAL_HITS)
                hits += int((scores >= least - _SAME).sum())
            if hits >= WANTED_RECALL * TRIALS * TRIAL_HITS:
                self._width = width
                return
        self._width = None
        recall = hits / (TRIALS * TRIAL_HITS)
        logger.warning("a graph of %d vectors finds %.3f of them: every vector is compared instead", len(self), recall)


_GONE = -1
"""In the place of the id of a row that was removed."""

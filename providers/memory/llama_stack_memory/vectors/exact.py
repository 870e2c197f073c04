"""Exact search by cosine similarity among vectors of length 1, held in memory.

Rows lie in blocks of a fixed size, so that growing copies nothing. A compiled scan over 8-bit codes of all rows, a
quarter of the bytes, bounds every row's score from both sides; only rows that may be among the best are compared in
full. With x the row, s c its code and e = x - s c what the code leaves out, and q' the query as the scan has it, the
error of a score is at most

    |x.q - s c.q'| <= |e| |q| + |s c| |q - q'|                                    (Cauchy-Schwarz)

so the result is that of comparing every row in full. Where nothing can be compiled, the scan reads the rows themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..interfaces import Vectors
from .native import scan

Ids: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]

BLOCK_ROWS = 4096
_GROUP = 64
"""Rows of which the best one stands for all, when the k-th best score is first bounded from below."""
_ROUNDING = np.float32(1e-5)
"""More than what float32 rounds off a score of at most 1 on the way."""


@dataclass(slots=True)
class _Block:
    vectors_RD: Vectors
    codes_RD: NDArray[np.int8]
    scales_R: Vectors
    errors_R: Vectors
    """The most by which a row's score from its code is off, for an exact query."""


@dataclass(slots=True)
class ExactIndex:
    """Vectors of length 1 by id. Not safe to change while it is searched."""

    dimensions: int
    _blocks: list[_Block] = field(default_factory=list)
    _ids_N: Ids = field(default_factory=lambda: np.empty(0, np.int64))
    """By row, longer than there are rows."""
    _row_of: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def ids(self) -> Ids:
        """The ids that it holds, by row; good until the next change."""
        return self._ids_N[: len(self)]

    def add(self, ids_A: Ids, vectors_AD: Vectors) -> None:
        """Add vectors under ids that it does not hold."""
        done = 0
        while done < len(ids_A):
            first = len(self)
            if first == len(self._blocks) * BLOCK_ROWS:
                self._grow()
            block, row = self._blocks[first // BLOCK_ROWS], first % BLOCK_ROWS
            count = min(BLOCK_ROWS - row, len(ids_A) - done)
            self._write(block, slice(row, row + count), vectors_AD[done : done + count])
            new = ids_A[done : done + count]
            self._ids_N[first : first + count] = new
            self._row_of.update(zip(new.tolist(), range(first, first + count), strict=True))
            done += count

    def remove(self, ids: Ids) -> None:
        """Remove those of the ids that it holds; the last row moves into each gap."""
        for id in ids.tolist():
            row = self._row_of.pop(id, None)
            if row is None:
                continue
            last = len(self)
            if row != last:
                into, out = self._blocks[row // BLOCK_ROWS], self._blocks[last // BLOCK_ROWS]
                for name in ("vectors_RD", "codes_RD", "scales_R", "errors_R"):
                    getattr(into, name)[row % BLOCK_ROWS] = getattr(out, name)[last % BLOCK_ROWS]
                self._ids_N[row] = self._ids_N[last]
                self._row_of[int(self._ids_N[row])] = row
            if last == (len(self._blocks) - 1) * BLOCK_ROWS:
                self._blocks.pop()

    def search(self, query_D: Vectors, k: int, is_allowed_N: Mask | None = None) -> tuple[Ids, NDArray[np.float64]]:
        """The ids of the ``k`` rows that are most similar to ``query_D`` (of length 1), and their similarities.

        Best first, equal ones by id. ``is_allowed_N`` says for each of ``ids`` whether it may be found.
        """
        return self._best(self._candidates(query_D, k, is_allowed_N), query_D, k)

    def best(self, ids: Ids, query_D: Vectors, k: int) -> tuple[Ids, NDArray[np.float64]]:
        """The best ``k`` of these ids, all of which it holds, as ``search`` gives them."""
        return self._best(np.array([self._row_of[id] for id in ids.tolist()], np.intp), query_D, k)

    def rows(self) -> Iterator[tuple[Ids, Vectors]]:
        """Everything that it holds, a block at a time; good until the next change."""
        for number, block in enumerate(self._blocks):
            ids = self.ids[number * BLOCK_ROWS : (number + 1) * BLOCK_ROWS]
            yield ids, block.vectors_RD[: len(ids)]

    def sample(self, count: int) -> Vectors:
        """Some of its vectors, always the same ones while nothing changes."""
        rows = np.random.default_rng(0).choice(len(self), min(count, len(self)), replace=False)
        return self._gathered(rows)

    def _best(self, rows_C: NDArray[np.intp], query_D: Vectors, k: int) -> tuple[Ids, NDArray[np.float64]]:
        scores_C = self._exact(rows_C, query_D)
        ids_C = self._ids_N[rows_C]
        order = np.lexsort((ids_C, -scores_C))[:k]
        return ids_C[order], scores_C[order]

    def _candidates(self, query_D: Vectors, k: int, is_allowed_N: Mask | None) -> NDArray[np.intp]:
        """Rows among which the best ``k`` are."""
        scores, errors = self._approximate(query_D)
        rows = None if is_allowed_N is None else np.flatnonzero(is_allowed_N)
        if rows is not None:
            scores, errors = scores[rows], errors[rows]
        possible = np.flatnonzero(scores + errors >= _bound(scores - errors, k))
        return possible if rows is None else rows[possible]

    def _approximate(self, query_D: Vectors) -> tuple[Vectors, Vectors]:
        """Each row's score, and the most by which it may be off."""
        scores_N, errors_N = np.empty(len(self), np.float32), np.empty(len(self), np.float32)
        function = scan()
        steps = min(32767 / max(float(np.abs(query_D).max()), 1e-9), 2**30 / (127 * self.dimensions**0.5))
        codes_D = np.rint(query_D * steps).astype(np.int16)
        lost = 2 * float(np.linalg.norm(query_D - codes_D / steps))  # |s c| is below 2
        for number, block in enumerate(self._blocks):
            first = number * BLOCK_ROWS
            rows = min(BLOCK_ROWS, len(self) - first)
            into = scores_N[first : first + rows]
            if function is None:
                np.matmul(block.vectors_RD[:rows], query_D, out=into)
                errors_N[first : first + rows] = _ROUNDING
            else:
                function(block.codes_RD, codes_D, block.scales_R, rows, self.dimensions, 1 / steps, into)
                np.add(block.errors_R[:rows], np.float32(lost) + _ROUNDING, out=errors_N[first : first + rows])
        return scores_N, errors_N

    def _exact(self, rows_C: NDArray[np.intp], query_D: Vectors) -> NDArray[np.float64]:
        scores_C = np.empty(len(rows_C), np.float64)
        query = query_D.astype(np.float64)
        for first in range(0, len(rows_C), BLOCK_ROWS):  # in parts, for all rows may be candidates
            rows_PD = self._gathered(rows_C[first : first + BLOCK_ROWS]).astype(np.float64)
            # Not BLAS, which may give one row two scores, by where it lies.
            np.einsum("pd,d->p", rows_PD, query, out=scores_C[first : first + BLOCK_ROWS])
        return scores_C

    def _gathered(self, rows_P: NDArray[np.intp]) -> Vectors:
        """A copy of some rows."""
        vectors_PD = np.empty((len(rows_P), self.dimensions), np.float32)
        for place, row in enumerate(rows_P.tolist()):
            vectors_PD[place] = self._blocks[row // BLOCK_ROWS].vectors_RD[row % BLOCK_ROWS]
        return vectors_PD

    def _grow(self) -> None:
        D = self.dimensions
        self._blocks.append(
            _Block(
                np.empty((BLOCK_ROWS, D), np.float32),
                np.empty((BLOCK_ROWS, D), np.int8),
                np.empty(BLOCK_ROWS, np.float32),
                np.empty(BLOCK_ROWS, np.float32),
            )
        )
        if len(self._blocks) * BLOCK_ROWS > len(self._ids_N):
            longer = np.empty(2 * len(self._blocks) * BLOCK_ROWS, np.int64)
            longer[: len(self)] = self._ids_N[: len(self)]
            self._ids_N = longer

    def _write(self, block: _Block, rows: slice, vectors_AD: Vectors) -> None:
        largest_A = np.abs(vectors_AD).max(axis=1)
        scales_A = np.where(largest_A == 0, 1, largest_A / 127).astype(np.float32)
        codes_AD = np.rint(vectors_AD / scales_A[:, None]).astype(np.int8)
        left_AD = vectors_AD - codes_AD * scales_A[:, None]
        block.vectors_RD[rows] = vectors_AD
        block.codes_RD[rows] = codes_AD
        block.scales_R[rows] = scales_A
        block.errors_R[rows] = np.linalg.norm(left_AD, axis=1) * 1.01


def _bound(low: Vectors, k: int) -> float:
    """At most the ``k``-th largest of ``low``: the k-th best of its groups' best ones, which are different rows."""
    if k >= len(low):
        return -np.inf
    groups = len(low) // _GROUP
    best = low[: groups * _GROUP].reshape(groups, _GROUP).max(axis=1) if groups >= k else low
    return float(np.partition(best, len(best) - k)[len(best) - k])

"""Joins rankings of one set by reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from .interfaces import Found

_K = 60
"""The paper's constant: how little a first place counts more than a second one."""


def fuse(rankings: Sequence[Sequence[Found]], k: int) -> list[Found]:
    """The best ``k``: each scores the sum of 1 / (60 + its place) over the rankings that have it; equal ones by id."""
    scores: defaultdict[int, float] = defaultdict(float)
    for ranking in rankings:
        for place, found in enumerate(ranking, 1):
            scores[found.chunk] += 1 / (_K + place)
    best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:k]
    return [Found(chunk, score) for chunk, score in best]

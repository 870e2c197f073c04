"""Splits a text into chunks of so many tokens, on the borders of sentences where there are any."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from .interfaces import Chunk, ChunkSettings, Span

LONGEST_TOKEN_CHARS = 128
"""A token of twice that and more, such as a megabyte without a space, is counted and cut as several.

None of its pieces is shorter than this: BERT's word pieces take what is longer than 100 characters for one token, and
a shorter rest could become a hundred of them."""
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*\s+|[。！？]|\n\s*\n|\n(?=\s*[-*#|])")  # noqa: RUF001 - not only ASCII ends sentences


def chunk(text: str, spans: Sequence[Span], settings: ChunkSettings) -> list[Chunk]:
    """The chunks of ``text``, whose tokens are at ``spans``; a text without tokens has none.

    A chunk ends with the last sentence that fits, if that leaves it at least half full, else with the last word that
    fits, else with the last token. The next one begins with the first sentence (or else word) that starts among the
    last ``settings.overlap`` tokens of it. Every token is in some chunk.
    """
    is_short = all(end - start <= LONGEST_TOKEN_CHARS for start, end in spans)  # as nearly always
    tokens = spans if is_short else list(_cut(spans))
    starts = [start for start, _ in tokens]
    sentences = [bisect_left(starts, match.end()) for match in _SENTENCE_END.finditer(text)]
    chunks: list[Chunk] = []
    first = last = 0
    while first < len(tokens):
        covered = last
        last = min(first + settings.tokens, len(tokens))  # exclusive
        if last < len(tokens):
            least = max(first + settings.tokens // 2, covered + 1)  # an overlap of half would add nothing otherwise
            last = _latest(sentences, least, last) or _word(text, starts, range(last, least - 1, -1)) or last
        start, end = tokens[first][0], tokens[last - 1][1]
        chunks.append(Chunk(text[start:end], start, end, last - first))
        if last == len(tokens):
            break
        overlap = max(last - min(settings.overlap, settings.tokens // 2), first + 1)
        first = _earliest(sentences, overlap, last) or _word(text, starts, range(overlap, last + 1)) or last
    return chunks


def _cut(spans: Sequence[Span]) -> Iterator[Span]:
    for start, end in spans:
        pieces = max((end - start) // LONGEST_TOKEN_CHARS, 1)
        borders = [start + (end - start) * n // pieces for n in range(pieces + 1)]
        yield from pairwise(borders)


def _word(text: str, starts: Sequence[int], tokens: range) -> int | None:
    """The first of ``tokens`` that no word reaches into from before it."""
    return next((n for n in tokens if not (text[starts[n]].isalnum() and text[starts[n] - 1].isalnum())), None)


def _latest(borders: Sequence[int], least: int, most: int) -> int | None:
    """The last of the sorted ``borders`` in [least, most]."""
    n = bisect_right(borders, most)
    return borders[n - 1] if n and borders[n - 1] >= least else None


def _earliest(borders: Sequence[int], least: int, most: int) -> int | None:
    """The first of the sorted ``borders`` in [least, most]."""
    n = bisect_left(borders, least)
    return borders[n] if n < len(borders) and borders[n] <= most else None

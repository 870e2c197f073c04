"""An embedder that needs no model: feature hashing of words and their letters (arXiv:0902.2206).

It finds texts that share words or parts of words, and knows nothing of what they mean. It is what a bank falls back on
where no sentence model is installed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from unicodedata import normalize
from zlib import crc32

import numpy as np

from ..interfaces import Span, Vectors

_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"\w{1,32}|[^\w\s]")
_WORD_WEIGHT = 1.0
_TRIGRAM_WEIGHT = 0.7
"""Of all the trigrams of a word together: enough that 'sailor' is near 'sailing', less than the word itself."""


class HashingEmbedder:
    """Each word adds to one place of the vector, and each of its trigrams to another, with a sign; both by a hash."""

    name = "feature-hashing"
    dimensions = 512
    max_tokens = 1 << 20

    def embed(self, texts: Sequence[str]) -> Vectors:
        """See ``Embedder.embed``."""
        vectors_TD = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        for vector_D, text in zip(vectors_TD, texts, strict=True):
            counts = Counter(word.lower() for word in _WORD.findall(normalize("NFKC", text)))
            for word, count in counts.items():
                for place, weight in _features(word, self.dimensions):
                    vector_D[place] += weight * (1 + np.log(count))
        norms_T1 = np.linalg.norm(vectors_TD, axis=1, keepdims=True)
        vectors_TD /= np.where(norms_T1 == 0, 1, norms_T1)
        return vectors_TD

    def token_spans(self, text: str) -> list[Span]:
        """Words, cut every 32 characters, and single punctuation marks."""
        return [match.span() for match in _TOKEN.finditer(text)]


@lru_cache(maxsize=65_536)
def _features(word: str, dimensions: int) -> tuple[tuple[int, float], ...]:
    return tuple(_hashed(word, dimensions))


def _hashed(word: str, dimensions: int) -> Iterator[tuple[int, float]]:
    yield _place(f"word {word}", dimensions, _WORD_WEIGHT)
    framed = f"<{word}>"
    trigrams = [framed[i : i + 3] for i in range(len(framed) - 2)]
    for trigram in trigrams:
        yield _place(f"part {trigram}", dimensions, _TRIGRAM_WEIGHT / len(trigrams) ** 0.5)


def _place(feature: str, dimensions: int, weight: float) -> tuple[int, float]:
    number = crc32(feature.encode("utf-8", "surrogatepass"))
    return (number >> 1) % dimensions, weight if number & 1 else -weight

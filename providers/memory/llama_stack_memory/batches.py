"""An embedder off the event loop, of which requests take turns batch by batch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from .chunking import chunk
from .interfaces import Chunk, ChunkSettings, Embedder, Vectors

BATCH_TEXTS = 32
"""Texts that the model takes at a time."""
TURN_SECONDS = 0.02
"""How long a large request goes on from batch to batch before others get the embedder."""


class BatchedEmbedder:
    """``model`` is what embeds; nothing else calls it."""

    def __init__(self, model: Embedder) -> None:
        self.model = model
        self._turn = asyncio.Lock()

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """The vectors of the texts, in order."""
        vectors = [np.empty((0, self.model.dimensions), np.float32)]
        rest = range(0, len(texts), BATCH_TEXTS)
        while rest:
            async with self._turn:
                done = await asyncio.to_thread(self._embed_some, texts, rest)
            vectors += done
            rest = rest[len(done) :]
        return np.concatenate(vectors)

    def _embed_some(self, texts: Sequence[str], firsts: Sequence[int]) -> list[Vectors]:
        """The vectors of the batches that begin at ``firsts``, as many as fit a turn and one at least."""
        done: list[Vectors] = []
        ends = perf_counter() + TURN_SECONDS
        for first in firsts:
            done.append(self.model.embed(texts[first : first + BATCH_TEXTS]))
            if perf_counter() > ends:
                break
        return done

    async def embed_query(self, text: str) -> Vectors:
        """The vector of a query; of one that is longer than the model reads, the mean of its pieces."""
        (pieces,) = await self.chunk([text], ChunkSettings(self.model.max_tokens, 0))
        sum_D: Vectors = (await self.embed([piece.text for piece in pieces])).sum(axis=0)
        sum_D /= np.linalg.norm(sum_D) or 1
        return sum_D

    async def chunk(self, texts: Sequence[str], settings: ChunkSettings) -> list[list[Chunk]]:
        """The chunks of each text, counted in the model's tokens."""
        return await asyncio.to_thread(lambda: [chunk(text, self.model.token_spans(text), settings) for text in texts])

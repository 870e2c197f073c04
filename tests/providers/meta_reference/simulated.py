"""A network that is a pure function of its context, over the memory of a paged cache: what it answers can be known.

Where a real one writes keys and values, it writes the token and a digest of all the text up to it, for these follow
from the whole text too. It reads its context back through the tables, so any mistake with blocks fails an assertion or
changes the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from zlib import crc32

import torch
from llama_stack_meta_reference.inference.batch import Batch
from torch import Tensor

VOCABULARY = 8
STOP = 7


def following(context: bytes) -> int:
    """The token after ``context``: one in eight follows from all of it, the others from its last two tokens.

    So every mistake shows soon, and the text is one that repeats itself often but not always.
    """
    hashed = crc32(context)
    return hashed // 8 % VOCABULARY if hashed % 8 == 0 else crc32(context[-2:]) % (VOCABULARY - 2)


def answer(prompt: list[int], limit: int) -> list[int]:
    """The whole text that ``prompt`` becomes when it runs alone, without the stop token."""
    text = bytearray(prompt)
    while len(text) < limit and (token := following(bytes(text))) != STOP:
        text.append(token)
    return list(text)


def drifting(context: bytes) -> int:
    """What another network, which is right more often than not, takes for the token after ``context``."""
    return following(context) if crc32(context[-3:]) % 3 else context[-1]


class SimulatedRunner:
    """A ``Runner`` of that network, or of another such function."""

    def __init__(self, *, blocks: int, block_tokens: int, function: Callable[[bytes], int] = following) -> None:
        self._following = function
        self.block_tokens = block_tokens
        self.device = torch.device("cpu")
        self.fault: Exception | None = None
        self._slots: list[tuple[int, int]] = []
        self._blocks = blocks
        self.reset()

    def run(self, batch: Batch) -> Tensor:
        """See ``Runner``."""
        tokens = torch.tensor(self.tokens(batch), dtype=torch.int64)
        return torch.nn.functional.one_hot(tokens, VOCABULARY).float()

    def tokens(self, batch: Batch) -> list[int]:
        """The likeliest token after each place of ``batch.sampled``. Raises ``fault`` in the middle of its work."""
        first = 0
        for start, count, table in zip(batch.starts, batch.counts, batch.tables, strict=True):
            digest = self._slots[self._slot(table, start - 1)][1] if start else 0
            for offset, token in enumerate(batch.tokens[first : first + count]):
                digest = crc32(bytes((token,)), digest)
                self._slots[self._slot(table, start + offset)] = token, digest
            first += count
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        first, sampled, wanted = 0, [], set(batch.sampled)
        assert all(one < next_one for one, next_one in pairwise(batch.sampled))
        for start, count, table in zip(batch.starts, batch.counts, batch.tables, strict=True):
            text = self.text(table, start + count)
            sampled += [self._following(text[: start + place + 1]) for place in range(count) if first + place in wanted]
            first += count
        return sampled

    def text(self, table: list[int], length: int) -> bytes:
        """What a sequence finds in its blocks: its text, each token computed with this text before it."""
        slots = [self._slots[self._slot(table, place)] for place in range(length)]
        digest = 0
        for token, known in slots:
            digest = crc32(bytes((token,)), digest)
            assert known == digest, "keys and values of another text"
        return bytes(token for token, _ in slots)

    def reset(self) -> None:
        """See ``Runner``."""
        self._slots = [(255, -1)] * (self._blocks * self.block_tokens)

    def close(self) -> None:
        """See ``Runner``."""

    def _slot(self, table: list[int], place: int) -> int:
        return table[place // self.block_tokens] * self.block_tokens + place % self.block_tokens

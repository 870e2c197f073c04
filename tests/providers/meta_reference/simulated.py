"""A network that is a pure function of its context, over the memory of a paged cache: what it answers can be known.

It writes the token ids themselves where a real one writes keys and values, and reads its context back through the
tables, so that any mistake with blocks changes the context, and with it the answer.
"""

from __future__ import annotations

from itertools import pairwise
from zlib import crc32

import torch
from llama_stack_meta_reference.inference.runner import Batch
from torch import Tensor

VOCABULARY = 8
STOP = 7
_BLANK = 255


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


class SimulatedRunner:
    """A ``Runner`` of that network."""

    def __init__(self, *, blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.device = torch.device("cpu")
        self.fault: Exception | None = None
        self._blocks = [bytearray([_BLANK] * block_tokens) for _ in range(blocks)]

    def run(self, batch: Batch) -> Tensor:
        """See ``Runner``."""
        tokens = torch.tensor(self.tokens(batch), dtype=torch.int64)
        return torch.nn.functional.one_hot(tokens, VOCABULARY).float()

    def tokens(self, batch: Batch) -> list[int]:
        """The likeliest token after each place of ``batch.sampled``. Raises ``fault`` in the middle of its work."""
        size, first, sampled = self.block_tokens, 0, []
        wanted = set(batch.sampled)
        for start, count, table in zip(batch.starts, batch.counts, batch.tables, strict=True):
            for offset in range(count):
                block, place = divmod(start + offset, size)
                self._blocks[table[block]][place] = batch.tokens[first + offset]
            first += count
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        first = 0
        for start, count, table in zip(batch.starts, batch.counts, batch.tables, strict=True):
            text = self.text(table, start + count)
            sampled += [following(text[: start + offset + 1]) for offset in range(count) if first + offset in wanted]
            first += count
        assert all(a < b for a, b in pairwise(batch.sampled))
        return sampled

    def text(self, table: list[int], length: int) -> bytes:
        """What a sequence finds in its blocks."""
        return b"".join(self._blocks[block] for block in table)[:length]

    def reset(self) -> None:
        """See ``Runner``."""
        for block in self._blocks:
            block[:] = bytes([_BLANK] * self.block_tokens)

    def close(self) -> None:
        """See ``Runner``."""

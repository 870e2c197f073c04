"""Which blocks hold whose keys and values: the books of a paged cache (Kwon et al. 2023, arXiv:2309.06180).

The memory is cut into blocks of a few tokens. A sequence owns a table of blocks, in the order of its positions, and
sequences that begin alike share the blocks of what they have in common. Here are numbers only; the tensors are the
runner's (``inference.runner``).

A block is in one of three states: held by one or more sequences; cached, held by nobody and still good for whoever
comes with the same beginning; or blank. The last two are free, and of the cached ones those go first that have been
left alone the longest. Owned by one thread at a time; no locking.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..llama.config import LlamaConfig

if TYPE_CHECKING:
    import torch

BLOCK_TOKENS = 16
"""Tokens of a block: fewer waste less of each sequence's last one, more make tables shorter."""

# What a block's contents follow from: the serial of the block before it, or below zero the adapter, and its own tokens.
# The tokens themselves are part of the key, so that equal hashes never pass for equal texts.
_Key = tuple[int, tuple[int, ...]]


def cache_bytes(config: LlamaConfig, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes that the keys and values of ``tokens`` tokens take over all layers."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize * tokens


def blocks_for(tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """Return how many blocks hold ``tokens`` tokens."""
    return -(-tokens // block_tokens)


class BlockPool:
    """The blocks of one cache and the index of what the full ones hold."""

    def __init__(self, blocks: int, block_tokens: int = BLOCK_TOKENS) -> None:
        if blocks < 1 or block_tokens < 1:
            raise ValueError(f"a cache needs at least 1 block of 1 token; asked for {blocks} of {block_tokens}")
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._references = [0] * blocks
        self._blank = list(range(blocks - 1, -1, -1))
        self._cached: dict[int, None] = {}  # in the order in which they were left
        self._index: dict[_Key, int] = {}
        self._keys: list[_Key | None] = [None] * blocks
        self._serials = [-1] * blocks
        self._next_serial = 0

    @property
    def free(self) -> int:
        """How many blocks can be allocated: blank ones, and cached ones that nobody holds."""
        return len(self._blank) + len(self._cached)

    @property
    def cached(self) -> int:
        """How many blocks nobody holds that are still good for reuse."""
        return len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks that hold anything. Check ``free`` first."""
        if count > self.free:
            raise RuntimeError(f"{count} cache blocks asked for, {self.free} of {self.blocks} are free")
        taken = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._evict()
            self._references[block] = 1
            taken.append(block)
        return taken

    def match(self, tokens: Sequence[int], adapter: int = 0) -> list[int]:
        """Take the indexed blocks of the longest known beginning of ``tokens``, never all of them.

        At least the last token is left to be run, for its logits. What ``adapter`` computed is its own: another's keys
        and values of the same text differ.
        """
        table: list[int] = []
        parent = -1 - adapter
        size = self.block_tokens
        for start in range(0, len(tokens) - size, size):
            block = self._index.get((parent, tuple(tokens[start : start + size])))
            if block is None:
                break
            if not self._references[block]:
                del self._cached[block]
            self._references[block] += 1
            table.append(block)
            parent = self._serials[block]
        return table

    def index(self, table: list[int], place: int, tokens: Sequence[int], adapter: int = 0) -> None:
        """Let others find the block ``table[place]``, now that all its positions hold ``tokens``' keys and values.

        Called for each block of a table in order. Where an equal block is known already, the table gets that one.
        """
        block = table[place]
        parent = self._serials[table[place - 1]] if place else -1 - adapter
        size = self.block_tokens
        key = (parent, tuple(tokens[place * size : (place + 1) * size]))
        known = self._index.setdefault(key, block)
        if known == block:
            self._keys[block] = key
            self._serials[block] = self._next_serial
            self._next_serial += 1
            return
        if not self._references[known]:
            del self._cached[known]
        self._references[known] += 1
        table[place] = known
        self._release(block)

    def release(self, table: list[int]) -> None:
        """Give the blocks of a table back and empty it; the indexed ones stay cached until their place is needed."""
        for block in reversed(table):  # the end goes first: without its beginning nobody would find it
            self._release(block)
        table.clear()

    def forget(self, table: Sequence[int]) -> None:
        """Let nobody find the blocks of a table any more: what they hold is not to be trusted."""
        for block in table:
            self._drop_key(block)
            if block in self._cached:
                del self._cached[block]
                self._blank.append(block)

    def clear(self) -> None:
        """Forget all that is indexed, after the memory was blanked."""
        self.forget(range(self.blocks))

    def _release(self, block: int) -> None:
        assert self._references[block] > 0, "a block was given back twice"
        self._references[block] -= 1
        if self._references[block]:
            return
        if self._keys[block] is None:
            self._blank.append(block)
        else:
            self._cached[block] = None

    def _evict(self) -> int:
        block = next(iter(self._cached))
        del self._cached[block]
        self._drop_key(block)
        return block

    def _drop_key(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._index[key]
            self._keys[block] = None

"""Where the keys and values of running sequences live.

First form: a fixed number of slots, each with contiguous space for one whole context, preallocated, so that memory is
known before the first request. A slot belongs to one sequence from ``allocate`` to ``release``. The network sees only a
view of one step (``llama.model.CacheView``), so another layout, paged for one, can take this one's place without
touching it.

The cache is owned by one thread and does no locking. Shape suffixes as in llama/model.py, and N for the new tokens of
all rows together.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..llama.config import LlamaConfig


def cache_bytes(config: LlamaConfig, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes that the keys and values of ``tokens`` tokens take over all layers."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize * tokens


class KVCache:
    """``slots`` sequences of up to ``context`` tokens each; takes ``cache_bytes(config, slots * context, dtype)`` at
    once.

    Usage, under ``torch.inference_mode()``::

        slot = cache.allocate()
        with cache.step([slot], [len(prompt)]) as view:
            logits_BTV = model(prompt_BT, view)
        cache.release(slot)
    """

    def __init__(
        self, config: LlamaConfig, *, slots: int, context: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        if slots < 1 or not 1 <= context <= config.max_context:
            raise ValueError(
                f"a cache needs at least 1 slot and a context from 1 to {config.max_context} tokens; "
                f"asked for {slots} slots of {context}"
            )
        self.slots = slots
        self.context = context
        self.device = torch.device(device)
        shape = (config.n_layers, slots, config.n_kv_heads, context, config.head_dim)
        # Not inference tensors even when made under inference_mode: those could not be written to outside of it.
        with torch.inference_mode(False):
            self._keys = torch.zeros(shape, device=device, dtype=dtype)
            self._values = torch.zeros(shape, device=device, dtype=dtype)
        self._lengths: dict[int, int] = {}
        self._free = list(range(slots))

    @property
    def free(self) -> int:
        """How many more sequences can be allocated."""
        return len(self._free)

    def allocate(self) -> int:
        """Return an empty slot, the lowest free one, since neighbours are read without a copy. Check ``free`` first."""
        if not self._free:
            raise RuntimeError(f"all {self.slots} cache slots are in use")
        slot = heapq.heappop(self._free)
        self._lengths[slot] = 0
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back and blank it."""
        length = self.length(slot)
        # Another sequence reads past its own end under a mask, and a mask multiplies by zero: an infinity left here
        # would become NaN there.
        self._keys[:, slot, :, :length] = 0
        self._values[:, slot, :, :length] = 0
        del self._lengths[slot]
        heapq.heappush(self._free, slot)

    def length(self, slot: int) -> int:
        """Return how many tokens a slot holds; KeyError when it is not allocated."""
        return self._lengths[slot]

    @contextmanager
    def step(self, rows: Sequence[int], counts: Sequence[int]) -> Iterator[SlotView]:
        """Yield the view for a forward pass that adds ``counts[i]`` tokens to slot ``rows[i]``.

        The batch is (len(rows), max(counts)), each row's tokens to the left and any padding to the right; each row
        continues at its own length. The lengths grow when the block ends; after an exception they are as before, and
        the step can be run again. Raises ValueError when a row would outgrow the context.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a cache step needs torch.inference_mode() or no_grad(): gradients do not flow through the cache"
            )
        if not rows or len(set(rows)) != len(rows) or len(rows) != len(counts) or min(counts) < 1:
            raise ValueError(
                f"a step needs distinct rows, each with a count from 1 up; found rows {rows}, counts {counts}"
            )
        starts = [self._lengths[row] for row in rows]
        for row, start, count in zip(rows, starts, counts, strict=True):
            if start + count > self.context:
                raise ValueError(f"slot {row} holds {start} of {self.context} tokens; {count} more do not fit")
        yield SlotView(self._keys, self._values, rows, starts, counts)
        for row, count in zip(rows, counts, strict=True):
            self._lengths[row] += count


class SlotView:
    """One step's view of a ``KVCache``; a ``CacheView``."""

    def __init__(
        self, keys: Tensor, values: Tensor, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]
    ) -> None:
        device = keys.device
        self._keys = keys
        self._values = values
        self._total = max(start + count for start, count in zip(starts, counts, strict=True))
        # All indices are made on the CPU: how many there are depends on values, for which a GPU's host would have to
        # wait.
        row_B, count_B, step_T = torch.tensor(rows), torch.tensor(counts), torch.arange(max(counts))
        positions_BT = torch.tensor(starts)[:, None] + step_T
        is_new_BT = step_T < count_B[:, None]
        self.positions_BT = positions_BT.to(device)
        self.mask_B1TS = self._mask(starts, counts)
        # Neighbouring rows are a slice, read in place; others must be gathered, which copies.
        is_slice = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        self._rows: slice | Tensor = slice(rows[0], rows[0] + len(rows)) if is_slice else row_B.to(device)
        # Padding is not stored: at the end of the context there is no room for it.
        self._row_N = row_B.repeat_interleave(count_B).to(device)
        self._position_N = positions_BT[is_new_BT].to(device)
        self._new_N: Tensor | None = None
        if min(counts) < max(counts):
            self._new_N = is_new_BT.flatten().nonzero()[:, 0].to(device)

    def update(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; return all of these rows, (B, G, S, K), valid until the next one."""
        return self._stored(self._keys[layer], k_BGTK), self._stored(self._values[layer], v_BGTK)

    def _stored(self, cached: Tensor, new_BGTK: Tensor) -> Tensor:
        new_NGK = new_BGTK.transpose(1, 2).flatten(0, 1)
        if self._new_N is not None:
            new_NGK = new_NGK[self._new_N]
        cached[self._row_N, :, self._position_N] = new_NGK
        whole = cached[:, :, : self._total]
        return whole[self._rows] if isinstance(self._rows, slice) else whole.index_select(0, self._rows)

    def _mask(self, starts: Sequence[int], counts: Sequence[int]) -> Tensor | None:
        is_fresh = max(starts) == 0
        is_even_decode = max(counts) == 1 and min(starts) == max(starts)
        if is_fresh or is_even_decode:
            return None
        position_S = torch.arange(self._total, device=self.positions_BT.device)
        return (position_S <= self.positions_BT[..., None])[:, None]

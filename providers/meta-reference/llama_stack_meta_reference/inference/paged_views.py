"""How the network sees a paged cache in one step: each a ``CacheView`` over the memory of a runner.

    PagedView    any step, any device: torch's own attention over what is gathered from the blocks
    FlashView    any step, on GPUs with FlashAttention (Dao 2023, arXiv:2307.08691): it reads the blocks where they are
    RowsView     steps of few tokens, each a row by itself, with sizes that depend on no number of the step: what a CUDA
                 graph needs (static_steps.py)

Shape suffixes as in llama/model.py, and: L layers, P blocks of the cache or of a table, C slots of the cache (one a
token), B sequences, S all tokens so far of the longest of them. The T of LPTGK is the tokens of a block.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Batch

logger = logging.getLogger("llama_stack.meta_reference.paged_views")

FLASH_BLOCK_TOKENS = 256
"""The blocks that FlashAttention 2 reads in place have so many tokens, or a multiple."""
_FLASH_TOLERANCE = 0.05
"""Of outputs around 0.1 to 1 in 16 bits; a row that was not written is off by more, or not a number."""


@dataclass(slots=True)
class _Chunk:
    """A sequence with several new tokens."""

    first: int
    end: int
    """Its place among the N new tokens."""
    slots_S: Tensor | None
    """The slots of all its tokens so far; None where all of them are new."""
    mask_TS: Tensor | None


class PagedView:
    """One step's view of a paged cache; a ``CacheView``. All indices are made here, once for all layers."""

    def __init__(self, keys_LPTGK: Tensor, values_LPTGK: Tensor, batch: Batch) -> None:
        device = keys_LPTGK.device
        size = keys_LPTGK.shape[2]
        self._keys_LCGK = keys_LPTGK.flatten(1, 2)
        self._values_LCGK = values_LPTGK.flatten(1, 2)
        blank = self._keys_LCGK.shape[1] - 1
        within = torch.arange(size)
        self._chunks: list[_Chunk] = []
        # All indices are made on the CPU and sent once: how many there are depends on values, for which a GPU's host
        # would have to wait.
        positions: list[int] = []
        slots: list[int] = []
        singles: list[int] = []
        first = 0
        for row, (start, count, table) in enumerate(zip(batch.starts, batch.counts, batch.tables, strict=True)):
            end = start + count
            assert count > 0, "a sequence in a step has something to run"
            assert end <= len(table) * size, "the table covers what is run"
            positions += range(start, end)
            if count == 1:
                singles.append(row)
                slots.append(table[start // size] * size + start % size)
            else:
                slots_S = (torch.tensor(table)[:, None] * size + within).flatten()[:end]
                slots += slots_S[start:].tolist()
                mask_TS = (torch.arange(end) <= torch.arange(start, end)[:, None]).to(device) if start else None
                self._chunks.append(_Chunk(first, first + count, slots_S.to(device) if start else None, mask_TS))
            first += count
        self.positions_N = torch.tensor(positions).to(device)
        self._slots_N = torch.tensor(slots).to(device)
        self._prepare_singles(batch, singles, blank, within, device)

    def _prepare_singles(self, batch: Batch, rows: list[int], blank: int, within: Tensor, device: torch.device) -> None:
        """Make the indices of the sequences with one new token, which attend together."""
        self._single_B: Tensor | None = None
        if not rows:
            return
        size = len(within)
        place, firsts = 0, []
        for count in batch.counts:
            firsts.append(place)
            place += count
        self._single_B = torch.tensor([firsts[row] for row in rows]).to(device)
        self._are_all_single = len(rows) == len(batch.counts)
        lengths = [batch.starts[row] + 1 for row in rows]
        longest = max(lengths)
        width = -(-longest // size)
        padded = [(batch.tables[row][:width] + [0] * width)[:width] for row in rows]
        slots_BS = (torch.tensor(padded)[..., None] * size + within).flatten(1)[:, :longest]
        is_real_BS = torch.arange(longest) < torch.tensor(lengths)[:, None]
        # Beyond a sequence's end stands a slot that is always zero: the masked weight is zero too, but zero times an
        # infinity that somebody left in a block is not a number.
        self._slots_BS = torch.where(is_real_BS, slots_BS, blank).to(device)
        self._mask_B11S: Tensor | None = None
        if min(lengths) < longest:
            mask_BS = torch.zeros(slots_BS.shape, dtype=self._keys_LCGK.dtype).masked_fill(~is_real_BS, -torch.inf)
            self._mask_B11S = mask_BS[:, None, None].to(device)

    def attend(self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """See ``CacheView``."""
        keys_CGK, values_CGK = self._keys_LCGK[layer], self._values_LCGK[layer]
        keys_CGK[self._slots_N] = k_NGK
        values_CGK[self._slots_N] = v_NGK
        if self._single_B is not None and self._are_all_single:
            return attend_gathered(q_NHK, keys_CGK, values_CGK, self._slots_BS, self._mask_B11S)
        output_NHK = torch.empty_like(q_NHK)
        if self._single_B is not None:
            output_NHK[self._single_B] = attend_gathered(
                q_NHK[self._single_B], keys_CGK, values_CGK, self._slots_BS, self._mask_B11S
            )
        for chunk in self._chunks:
            new = slice(chunk.first, chunk.end)
            if chunk.slots_S is None:
                k_SGK, v_SGK = k_NGK[new], v_NGK[new]
            else:
                k_SGK, v_SGK = keys_CGK.index_select(0, chunk.slots_S), values_CGK.index_select(0, chunk.slots_S)
            q_1HTK, k_1GSK, v_1GSK = (x.transpose(0, 1)[None] for x in (q_NHK[new], k_SGK, v_SGK))
            attended_1HTK = F.scaled_dot_product_attention(
                q_1HTK, k_1GSK, v_1GSK, attn_mask=chunk.mask_TS, is_causal=chunk.mask_TS is None, enable_gqa=True
            )
            output_NHK[new] = attended_1HTK[0].transpose(0, 1)
        return output_NHK


class FlashView:
    """One step's view where FlashAttention reads the blocks in place; all sequences of a step attend in one call."""

    def __init__(
        self,
        keys_LPTGK: Tensor,
        values_LPTGK: Tensor,
        *,
        positions_N: Tensor,
        slots_N: Tensor,
        ends_B: Tensor,
        lengths_B: Tensor,
        tables_BP: Tensor,
        longest_new: int,
    ) -> None:
        """``ends_B`` counts the new tokens up to a sequence's end, and ``lengths_B`` all tokens of a sequence, both
        int32 as the tables are; what stands in a table behind them is not read.
        """
        from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler, for seconds

        self._attention = varlen_attn
        self._keys_LPTGK, self._values_LPTGK = keys_LPTGK, values_LPTGK
        self.positions_N = positions_N
        self._slots_N = slots_N
        self._ends_0B, self._key_ends_0B = (
            F.pad(ends_B, (1, 0)) for ends_B in (ends_B, lengths_B.cumsum(0, dtype=torch.int32))
        )
        self._lengths_B, self._tables_BP = lengths_B, tables_BP
        self._longest_new = longest_new

    @classmethod
    def of(cls, keys_LPTGK: Tensor, values_LPTGK: Tensor, batch: Batch) -> FlashView:
        """The view of any step."""
        size, device = keys_LPTGK.shape[2], keys_LPTGK.device
        positions: list[int] = []
        slots: list[int] = []
        for start, count, table in zip(batch.starts, batch.counts, batch.tables, strict=True):
            positions += range(start, start + count)
            slots += [table[at // size] * size + at % size for at in range(start, start + count)]
        width = max(map(len, batch.tables))
        lengths = [start + count for start, count in zip(batch.starts, batch.counts, strict=True)]
        tables = [table + [0] * (width - len(table)) for table in batch.tables]
        return cls(
            keys_LPTGK,
            values_LPTGK,
            positions_N=torch.tensor(positions).to(device),
            slots_N=torch.tensor(slots).to(device),
            ends_B=torch.tensor([*accumulate(batch.counts)], dtype=torch.int32).to(device),
            lengths_B=torch.tensor(lengths, dtype=torch.int32).to(device),
            tables_BP=torch.tensor(tables, dtype=torch.int32).to(device),
            longest_new=max(batch.counts),
        )

    def attend(self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """See ``CacheView``."""
        keys_PTGK, values_PTGK = self._keys_LPTGK[layer], self._values_LPTGK[layer]
        keys_PTGK.flatten(0, 1)[self._slots_N] = k_NGK
        values_PTGK.flatten(0, 1)[self._slots_N] = v_NGK
        attended_NHK = self._attention(
            q_NHK,
            keys_PTGK,
            values_PTGK,
            self._ends_0B,
            self._key_ends_0B,
            self._longest_new,
            self._tables_BP.shape[1] * keys_PTGK.shape[1],
            # A single token may see all there is; without a mask the kernel takes the heads of a group together.
            window_size=(-1, 0) if self._longest_new > 1 else (-1, -1),
            enable_gqa=True,
            seqused_k=self._lengths_B,
            block_table=self._tables_BP,
            # Left to itself the kernel splits keys, and leaves rows of its answer unwritten: pytorch issue 194167.
            num_splits=1,
        )
        assert isinstance(attended_NHK, Tensor), "nothing else was asked for"
        return attended_NHK


class RowsView:
    """One step's view where each new token is a row with the table of its sequence, whole in the cache."""

    def __init__(
        self, keys_LPTGK: Tensor, values_LPTGK: Tensor, *, positions_N: Tensor, slots_N: Tensor, tables_NP: Tensor
    ) -> None:
        size = keys_LPTGK.shape[2]
        self._keys_LCGK, self._values_LCGK = keys_LPTGK.flatten(1, 2), values_LPTGK.flatten(1, 2)
        self.positions_N = positions_N
        self._slots_N = slots_N
        position_S = torch.arange(tables_NP.shape[1] * size, device=tables_NP.device)
        slots_NS = (tables_NP[..., None] * size + position_S[:size]).flatten(1)
        is_seen_NS = position_S <= positions_N[:, None]
        # As in PagedView: behind a sequence's end stands a slot that is always zero.
        self._read_NS = slots_NS.masked_fill(~is_seen_NS, self._keys_LCGK.shape[1] - 1)
        self._mask_N11S = is_seen_NS[:, None, None]

    def attend(self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """See ``CacheView``."""
        keys_CGK, values_CGK = self._keys_LCGK[layer], self._values_LCGK[layer]
        keys_CGK[self._slots_N] = k_NGK
        values_CGK[self._slots_N] = v_NGK
        return attend_gathered(q_NHK, keys_CGK, values_CGK, self._read_NS, self._mask_N11S)


@cache
def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether ``FlashView`` can be used there: tried out, for what a build of torch brings is not known by its name."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.backends.cuda.is_flash_attention_available()
        and flash_agrees(device, dtype, head_dim)
    )


@torch.inference_mode()
def flash_agrees(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether ``FlashView`` gives what ``PagedView`` gives, in a step with a chunk of a prompt and in one without."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, head_dim, generator=generator).to(device, dtype)

    for counts in ([3, 1], [1, 1]):
        batch = Batch(tokens=[0] * sum(counts), starts=[300, 5], counts=counts, tables=[[2, 0], [1]])
        keys_LPTGK, values_LPTGK = drawn(1, 4, FLASH_BLOCK_TOKENS, 2), drawn(1, 4, FLASH_BLOCK_TOKENS, 2)
        keys_LPTGK[:, -1], values_LPTGK[:, -1] = 0, 0
        new = drawn(sum(counts), 8), drawn(sum(counts), 2), drawn(sum(counts), 2)
        expected_NHK = PagedView(keys_LPTGK, values_LPTGK, batch).attend(0, *new)
        try:
            found_NHK = FlashView.of(keys_LPTGK, values_LPTGK, batch).attend(0, *new)
        except RuntimeError as error:
            logger.info("FlashAttention is not used on %s: %s", device, str(error).partition("\n")[0])
            return False
        difference = float((found_NHK - expected_NHK).abs().max())
        if not difference < _FLASH_TOLERANCE:
            logger.warning("FlashAttention is not used on %s: its answers are off by %.2g", device, difference)
            return False
    return True


def attend_gathered(
    q_BHK: Tensor, keys_CGK: Tensor, values_CGK: Tensor, slots_BS: Tensor, mask_B11S: Tensor | None
) -> Tensor:
    """Let one token of each sequence attend to what is in its slots; returns (B, H, K)."""
    k_BGSK, v_BGSK = (
        x_CGK.index_select(0, slots_BS.flatten()).view(*slots_BS.shape, *x_CGK.shape[1:]).transpose(1, 2)
        for x_CGK in (keys_CGK, values_CGK)
    )
    # The heads of a group take the place of query tokens: each key is read once for all of them.
    q_BGRK = q_BHK.reshape(q_BHK.shape[0], k_BGSK.shape[1], -1, q_BHK.shape[2])
    return F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSK, attn_mask=mask_B11S).flatten(1, 2)

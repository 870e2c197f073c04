"""Who executes steps: the network with the memory of its cache, behind one small interface.

The engine decides what a step works on and keeps the books (``scheduler``, ``kv_cache``); a runner owns weights, keys
and values, and knows neither requests nor how tokens are picked. Which one a model gets is settled in loading.py.

Shape suffixes as in llama/model.py, and: P blocks of the cache, C slots of the cache (one a token), R rows whose logits
are wanted, B sequences with one new token each, S all tokens so far of the longest of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..llama.config import LlamaConfig
from ..llama.lora import LoraAdapter
from ..llama.model import Attention, Llama
from ..llama.parallel import Rank
from ..llama.quantize import empty_rounded
from .adapters import Adapters
from .batch import Batch
from .kv_cache import BLOCK_TOKENS, cache_bytes


class Runner(Protocol):
    """Executes steps. Called by one thread at a time."""

    @property
    def block_tokens(self) -> int:
        """How many tokens a block of the cache holds."""
        ...

    @property
    def config(self) -> LlamaConfig:
        """The sizes of the whole network."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the logits are."""
        ...

    def run(self, batch: Batch) -> Tensor:
        """Store the new tokens' keys and values; return (R, V) float32 logits for ``batch.sampled``, on ``device``.

        V may be more than the tokenizer knows. R may be 0. The tensor is good until the next call. After an exception
        the cache holds anything: call ``reset``.
        """
        ...

    def add_adapter(self, number: int, adapter: LoraAdapter) -> None:
        """Hold an adapter, which ``batch.adapters`` calls by this number."""
        ...

    def remove_adapter(self, number: int) -> None:
        """Let go of it; nothing happens if it is not there."""
        ...

    def reset(self) -> None:
        """Blank the cache."""
        ...

    def close(self) -> None:
        """Free weights and cache; nothing else may be called afterwards."""
        ...


class Storage(Protocol):
    """How a runner keeps weights and cache: known before there is one, for the memory plan."""

    @property
    def name(self) -> str:
        """What an operator calls the type of the weights."""
        ...

    def weight_bytes(self, config: LlamaConfig) -> int:
        """How many bytes the weights take."""
        ...

    def loading_bytes(self, config: LlamaConfig) -> int:
        """How many bytes the weights take at the most while they are loaded, before there is a cache."""
        ...

    def cache_bytes_per_token(self, config: LlamaConfig) -> int:
        """How many bytes the keys and values of one token take over all layers."""
        ...


@dataclass(frozen=True)
class TorchStorage:
    """Weights and cache in one type of torch's, or the matrices rounded to fewer bits."""

    dtype: torch.dtype
    rounding: str | None = None
    """One of ``quantize.KINDS``, or None for matrices in ``dtype`` too."""

    @property
    def name(self) -> str:
        """As ``float32``."""
        return self.rounding or str(self.dtype).removeprefix("torch.")

    def weight_bytes(self, config: LlamaConfig) -> int:
        """See ``Storage``."""
        if self.rounding is None:
            return config.parameter_count * self.dtype.itemsize
        model = empty_rounded(config, self.rounding, device="meta", dtype=self.dtype)
        return sum(weight.nbytes for weight in model.state_dict().values())

    def loading_bytes(self, config: LlamaConfig) -> int:
        """See ``Storage``: beside the rounded weights there is one that is not yet."""
        if self.rounding is None:
            return self.weight_bytes(config)
        largest = config.dim * max(config.vocab_size, config.ffn_dim, config.n_heads * config.head_dim)
        return self.weight_bytes(config) + largest * self.dtype.itemsize

    def cache_bytes_per_token(self, config: LlamaConfig) -> int:
        """See ``Storage``."""
        return cache_bytes(config, 1, self.dtype)


class TorchRunner:
    """Runs the plain network on any device that torch has."""

    def __init__(
        self, model: Llama, *, blocks: int, block_tokens: int = BLOCK_TOKENS, rank: Rank | None = None
    ) -> None:
        weight = model.tok_embeddings.weight
        attention = model.layers[0].attention
        assert isinstance(attention, Attention)
        self.block_tokens = block_tokens
        self.device = weight.device
        self._model: Llama | None = model
        self._adapters: Adapters | None = Adapters(model, rank)
        config = self.config = model.config
        # One block more than asked for: it stays zero, and whatever is read beyond the end of a sequence is read there.
        shape = (config.n_layers, blocks + 1, block_tokens, attention.n_kv_heads, config.head_dim)
        # Not inference tensors even when made under inference_mode: those could not be written to outside of it.
        with torch.inference_mode(False):
            self._keys: Tensor | None = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
            self._values: Tensor | None = torch.zeros(shape, device=weight.device, dtype=weight.dtype)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """See ``Runner``. The hidden states of a step are made whole, the logits only where they are wanted."""
        assert self._model is not None
        assert self._keys is not None
        assert self._values is not None
        assert self._adapters is not None
        self._adapters.select(batch)
        view = PagedView(self._keys, self._values, batch)
        hidden_ND = self._model.hidden(torch.tensor(batch.tokens).to(self.device), view)
        if len(batch.sampled) != len(batch.tokens):
            hidden_ND = hidden_ND[torch.tensor(batch.sampled, dtype=torch.int64).to(self.device)]
        return self._model.logits(hidden_ND)

    def add_adapter(self, number: int, adapter: LoraAdapter) -> None:
        """See ``Runner``."""
        assert self._adapters is not None
        self._adapters.add(number, adapter)

    def remove_adapter(self, number: int) -> None:
        """See ``Runner``."""
        assert self._adapters is not None
        self._adapters.remove(number)

    def reset(self) -> None:
        """Zero the cache, in place: there may be no memory for a second one."""
        assert self._keys is not None
        assert self._values is not None
        self._keys.zero_()
        self._values.zero_()

    def close(self) -> None:
        """Free weights and cache."""
        self._model = self._adapters = self._keys = self._values = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


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
            return self._attend_singles(q_NHK, keys_CGK, values_CGK)
        output_NHK = torch.empty_like(q_NHK)
        if self._single_B is not None:
            output_NHK[self._single_B] = self._attend_singles(q_NHK[self._single_B], keys_CGK, values_CGK)
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

    def _attend_singles(self, q_BHK: Tensor, keys_CGK: Tensor, values_CGK: Tensor) -> Tensor:
        k_BGSK, v_BGSK = (
            x_CGK.index_select(0, self._slots_BS.flatten())
            .view(*self._slots_BS.shape, *x_CGK.shape[1:])
            .transpose(1, 2)
            for x_CGK in (keys_CGK, values_CGK)
        )
        # The heads of a group take the place of query tokens: each key is read once for all of them.
        q_BGRK = q_BHK.reshape(q_BHK.shape[0], k_BGSK.shape[1], -1, q_BHK.shape[2])
        return F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSK, attn_mask=self._mask_B11S).flatten(1, 2)

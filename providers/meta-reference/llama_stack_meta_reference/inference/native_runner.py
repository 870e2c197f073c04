"""The runner for CPUs: a whole step in one call of the compiled kernels (native/kernels.cpp).

Its cache is its own: float16, or float32 beside float32 weights; keys of a block are transposed, so that sixteen tokens
are scored at a time. Room for the activations grows with the largest step and is kept.

Shape suffixes as in llama/model.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..llama.config import LlamaConfig
from ..llama.lora import TARGETS, LoraAdapter
from ..llama.model import Attention, Block, FeedForward, Llama
from ..native.library import (
    BLOCK,
    INPUT_MULTIPLE,
    LANES,
    PANEL,
    WIDEST_HEAD,
    CAdapter,
    CLayer,
    CLowRank,
    CNetwork,
    CWork,
    library,
)
from ..native.matrix import PackedMatrix, Scratch, padded, zeros_to_stream
from .batch import Batch

_BITS = {"float32": 32.0, "float16": 16.0, "int8": 8.25, "int4": 4.5}
"""Bits a weight, scales included."""


def supports(config: LlamaConfig) -> bool:
    """Whether the kernels know networks of this shape."""
    return config.head_dim <= WIDEST_HEAD


def _cache_dtype(kind: str) -> torch.dtype:
    return torch.float32 if kind == "float32" else torch.float16


@dataclass(frozen=True)
class NativeStorage:
    """Packed weights of one of ``KINDS``, and the cache beside them; a ``Storage``."""

    kind: str
    table_dtype: torch.dtype
    """Of the embedding table, which stays as the checkpoint has it."""

    @property
    def name(self) -> str:
        """As in ``KINDS``."""
        return self.kind

    def weight_bytes(self, config: LlamaConfig) -> int:
        """See ``Storage``; without what padding adds."""
        table = config.vocab_size * config.dim
        packed = config.parameter_count - (0 if config.tied_embeddings else table)
        return int(packed * _BITS[self.kind] / 8) + table * self.table_dtype.itemsize

    def loading_bytes(self, config: LlamaConfig) -> int:
        """See ``Storage``: the network is whole when its matrices are packed, and freed, one by one."""
        return max(self.weight_bytes(config), config.parameter_count * self.table_dtype.itemsize)

    def cache_bytes_per_token(self, config: LlamaConfig) -> int:
        """See ``Storage``."""
        return (
            2 * _cache_dtype(self.kind).itemsize * config.n_layers * config.n_kv_heads * padded(config.head_dim, LANES)
        )


class _PackedAdapter:
    """An adapter as the kernels read it. Holds the memory that ``c`` points into."""

    def __init__(self, adapter: LoraAdapter, config: LlamaConfig) -> None:
        rank = padded(adapter.rank, LANES)
        self._pairs = (CLowRank * (config.n_layers * len(TARGETS)))()
        self._halves: list[Tensor] = []
        for place, (layer, target) in enumerate(product(range(config.n_layers), TARGETS.values())):
            pair = adapter.pairs.get(f"layers.{layer}.{target}")
            if pair is not None:
                down_IR, up_RO = (F.pad(half, (0, 0, 0, rank - adapter.rank)) for half in (pair.down_RI, pair.up_OR.T))
                self._halves += (down_IR := down_IR.T.contiguous(), up_RO := up_RO.contiguous())
                self._pairs[place] = CLowRank(down_IR.data_ptr(), up_RO.data_ptr())
        self.c = CAdapter(rank, self._pairs)


class _Selected(NamedTuple):
    """The adapters of one step, and the place of each row's among them."""

    array: ctypes.Array[CAdapter] | None
    of_rows: ctypes.Array[ctypes.c_int32] | None


class NativeRunner:
    """A ``Runner`` over packed weights. Takes ``model`` apart: its matrices are freed one by one as they are packed."""

    block_tokens = BLOCK
    device = torch.device("cpu")

    def __init__(self, model: Llama, *, kind: str, blocks: int, context: int) -> None:
        """``kind`` is one of ``KINDS``. Raises ``ValueError`` for weights that it cannot hold."""
        config = self.config = model.config
        self._kernels = library()
        self._table_VD: Tensor | None = model.tok_embeddings.weight.detach()
        self._weights: list[PackedMatrix] = []
        self._norms: list[Tensor] = []
        self._adapters: dict[int, _PackedAdapter] = {}
        layers = (CLayer * config.n_layers)(*(self._layer(block, kind) for block in _blocks(model)))
        head = self._packed(kind, [self._table_VD] if model.output is None else [_taken(model.output)])
        cosine, sine = (
            angle[0, :, 0, : config.head_dim // 2].contiguous() for angle in model.rotary(torch.arange(context)[None])
        )
        lanes = padded(config.head_dim, LANES)
        # What is kept in full is attended to in full; beside rounded weights the cache's float16 does not show.
        dtype = _cache_dtype(kind)
        layer = blocks * config.n_kv_heads * lanes * BLOCK
        self._keys: Tensor | None = zeros_to_stream(config.n_layers * layer, dtype)
        self._values: Tensor | None = zeros_to_stream(config.n_layers * layer, dtype)
        self._rows = 0
        self._logits = torch.empty(1, padded(config.vocab_size, PANEL))
        self._angles = (cosine, sine)
        self._network = CNetwork(
            layers=config.n_layers,
            dim=config.dim,
            query_heads=config.n_heads,
            key_heads=config.n_kv_heads,
            head_width=config.head_dim,
            ffn_dim=config.ffn_dim,
            kind=head.c.kind,
            epsilon=config.norm_eps,
            layer=layers,
            norm=self._norm(model.norm.weight),
            head=head.c,
            cosine=cosine.data_ptr(),
            sine=sine.data_ptr(),
            keys=self._keys.data_ptr(),
            values=self._values.data_ptr(),
            layer_bytes=layer * dtype.itemsize,
            blocks=blocks,
            has_half_cache=dtype is torch.float16,
            low=0,
            low_rank=0,
            threads=torch.get_num_threads(),
        )

    def run(self, batch: Batch) -> Tensor:
        """See ``Runner``."""
        assert self._table_VD is not None, "not closed"
        rows, sampled = len(batch.tokens), len(batch.sampled)
        if rows > self._rows:
            self._make_room(rows)
        embedded_ND = F.embedding(torch.tensor(batch.tokens), self._table_VD).float().contiguous()
        if len(self._logits) < sampled:
            self._logits = torch.empty(sampled, padded(self.config.vocab_size, PANEL))
        width = max(map(len, batch.tables))
        positions: list[int] = []
        slots: list[int] = []
        for start, count, table in zip(batch.starts, batch.counts, batch.tables, strict=True):
            positions += range(start, start + count)
            slots += [table[at // BLOCK] * BLOCK + at % BLOCK for at in range(start, start + count)]
        adapters = self._selected(batch)
        tables = chain.from_iterable(table + [0] * (width - len(table)) for table in batch.tables)
        work = CWork(
            rows=rows,
            sequences=len(batch.counts),
            sampled=sampled,
            table_width=width,
            embedded=embedded_ND.data_ptr(),
            start=_address(start_array := _numbers(batch.starts)),
            count=_address(count_array := _numbers(batch.counts)),
            tables=_address(table_array := _numbers([*tables])),
            sampled_rows=_address(sampled_array := _numbers(batch.sampled)),
            position=_address(position_array := _numbers(positions)),
            slot=_address(slot_array := _numbers(slots)),
            adapters=adapters.array,
            adapter=adapters.of_rows and _address(adapters.of_rows),
            logits=self._logits.data_ptr(),
        )
        self._kernels.step(ctypes.byref(self._network), ctypes.byref(work))
        # The arrays must outlive the call: ctypes keeps addresses, not objects.
        del start_array, count_array, table_array, sampled_array, position_array, slot_array, embedded_ND, adapters
        return self._logits[:sampled, : self.config.vocab_size]

    def add_adapter(self, number: int, adapter: LoraAdapter) -> None:
        """See ``Runner``. Adapters stay float32, whatever the weights are."""
        self._adapters[number] = _PackedAdapter(adapter, self.config)
        self._rows = 0  # room is made again, now for the largest rank

    def remove_adapter(self, number: int) -> None:
        """See ``Runner``."""
        self._adapters.pop(number, None)

    def reset(self) -> None:
        """Zero the cache, in place."""
        assert self._keys is not None
        assert self._values is not None
        self._keys.zero_()
        self._values.zero_()

    def close(self) -> None:
        """Free weights and cache."""
        self._table_VD = self._keys = self._values = None
        self._weights.clear()
        self._adapters.clear()

    def _selected(self, batch: Batch) -> _Selected:
        if not any(batch.adapters):
            return _Selected(None, None)
        numbers = sorted({number for number in batch.adapters if number})
        place = {0: -1} | {number: place for place, number in enumerate(numbers)}
        rows = [place[n] for n, count in zip(batch.adapters, batch.counts, strict=True) for _ in range(count)]
        return _Selected((CAdapter * len(numbers))(*(self._adapters[number].c for number in numbers)), _numbers(rows))

    def _make_room(self, rows: int) -> None:
        config, network = self.config, self._network
        ffn = padded(config.ffn_dim, PANEL)
        wide = max(padded((config.n_heads + 2 * config.n_kv_heads) * config.head_dim, PANEL), 2 * ffn)
        inputs = padded(max(config.dim, config.n_heads * config.head_dim, ffn), INPUT_MULTIPLE)
        self._rows = 0  # where memory runs out below, some of the old room is gone and the next step must ask again
        self._room = (
            torch.empty(rows, padded(config.dim, PANEL)),
            torch.empty(rows, wide),
            torch.empty(rows, config.n_heads, padded(config.head_dim, LANES)),
        )
        network.low_rank = max((adapter.c.rank for adapter in self._adapters.values()), default=0)
        self._low = torch.empty(rows, 3, network.low_rank)
        network.x, network.wide, network.attended = (tensor.data_ptr() for tensor in self._room)
        network.low = self._low.data_ptr()
        self._scratch = Scratch(rows, inputs)
        network.floats, network.bytes = self._scratch.floats.data_ptr(), self._scratch.bytes.data_ptr()
        network.scales, network.starts = self._scratch.scales.data_ptr(), self._scratch.starts.data_ptr()
        self._rows = rows

    def _layer(self, block: Block, kind: str) -> CLayer:
        attention, feed_forward = block.attention, block.feed_forward
        assert isinstance(attention, Attention)
        assert isinstance(feed_forward, FeedForward)
        qkv_OI = torch.cat([_taken(linear) for linear in (attention.wq, attention.wk, attention.wv)])
        return CLayer(
            self._norm(block.attention_norm.weight),
            self._norm(block.ffn_norm.weight),
            self._packed(kind, [qkv_OI]).c,
            self._packed(kind, [_taken(attention.wo)]).c,
            self._packed(kind, [_taken(feed_forward.w1), _taken(feed_forward.w3)]).c,
            self._packed(kind, [_taken(feed_forward.w2)]).c,
        )

    def _packed(self, kind: str, parts: list[Tensor]) -> PackedMatrix:
        self._weights.append(PackedMatrix(kind, parts))
        return self._weights[-1]

    def _norm(self, weight: Tensor) -> int:
        self._norms.append(weight.detach().float().contiguous())
        return self._norms[-1].data_ptr()


def _blocks(model: Llama) -> Iterator[Block]:
    for block in model.layers:
        assert isinstance(block, Block)
        yield block


def _taken(linear: nn.Linear) -> Tensor:
    """The weights, which the layer loses: two copies of a large network would not fit."""
    weight = linear.weight.detach()
    linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    return weight


def _numbers(values: list[int]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(values))(*values)


def _address(array: ctypes.Array[ctypes.c_int32]) -> int:
    return ctypes.addressof(array)

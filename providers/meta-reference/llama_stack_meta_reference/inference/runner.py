"""Who executes steps: the network with the memory of its cache, behind one small interface.

The engine decides what a step works on and keeps the books (``scheduler``, ``kv_cache``); a runner owns weights, keys
and values, and knows neither requests nor how tokens are picked. Which one a model gets is settled in loading.py.

Shape suffixes as in llama/model.py, and R rows whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..llama.config import LlamaConfig
from ..llama.lora import LoraAdapter
from ..llama.model import Attention, Llama
from ..llama.parallel import Rank
from ..llama.quantize import empty_rounded
from .adapters import Adapters
from .batch import Batch
from .kv_cache import BLOCK_TOKENS, cache_bytes
from .paged_views import FLASH_BLOCK_TOKENS, FlashView, PagedView, has_flash
from .static_steps import StaticSteps


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
        self,
        model: Llama,
        *,
        blocks: int,
        block_tokens: int = BLOCK_TOKENS,
        rank: Rank | None = None,
        static_rows: int = 0,
        context: int = 0,
        compiler: str | None = None,
    ) -> None:
        """With ``static_rows``, steps of up to so many tokens of sequences of up to ``context`` run over buffers that
        stay where they are, on a GPU as CUDA graphs, and compiled with a ``compiler``, a backend of ``torch.compile``.
        """
        weight = model.tok_embeddings.weight
        attention = model.layers[0].attention
        assert isinstance(attention, Attention)
        self.block_tokens = block_tokens
        self.device = weight.device
        self._model: Llama | None = model
        self._adapters: Adapters | None = Adapters(model, rank)
        config = self.config = model.config
        self._is_flash = not block_tokens % FLASH_BLOCK_TOKENS and has_flash(
            weight.device, weight.dtype, config.head_dim
        )
        # Two blocks more than asked for: what pads a step is written to the first. The last stays zero, and whatever is
        # read beyond the end of a sequence is read there.
        shape = (config.n_layers, blocks + 2, block_tokens, attention.n_kv_heads, config.head_dim)
        # Not inference tensors even when made under inference_mode: those could not be written to outside of it.
        with torch.inference_mode(False):
            self._keys: Tensor | None = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
            self._values: Tensor | None = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        self._static: StaticSteps | None = None
        if static_rows:
            self._static = StaticSteps(
                model,
                self._keys,
                self._values,
                context=context,
                rows=static_rows,
                is_flash=self._is_flash,
                compiler=compiler,
            )

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """See ``Runner``. The hidden states of a step are made whole, the logits only where they are wanted."""
        assert self._model is not None
        assert self._keys is not None
        assert self._values is not None
        assert self._adapters is not None
        self._adapters.select(batch)
        if self._static is not None and self._static.takes(batch):
            return self._static.run(batch)
        view: PagedView | FlashView
        if self._is_flash:
            view = FlashView.of(self._keys, self._values, batch)
        else:
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
        self._model = self._adapters = self._static = self._keys = self._values = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

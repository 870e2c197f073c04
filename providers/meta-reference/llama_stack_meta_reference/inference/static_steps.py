"""Steps of few tokens over buffers that stay where they are, so that a GPU repeats them as CUDA graphs.

Such a step takes a GPU less time than its host needs to launch the network's thousand kernels one by one; a graph
launches them all at once. It repeats what was captured with the same memory and the same sizes, so a step is padded to
the next of a few sizes, and each new token is a row: itself, its position and the blocks of its sequence. Tokens of one
sequence are rows like others: all keys of a step are stored before any is read. A row that only pads works on a block
that nobody reads. Without graphs, as on a CPU, the same work is done step by step.

Shape suffixes as in paged_views.py; a row of numbers is 2 + P wide.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from ..llama.model import Block, CacheView, Llama
from .batch import Batch
from .kv_cache import blocks_for
from .paged_views import FlashView, RowsView

logger = logging.getLogger("llama_stack.meta_reference.static_steps")

_MOST_NEW = 17
"""How many new tokens of one sequence are worth a row each, with its keys read for each: a token and its guesses."""


class StaticSteps:
    """Runs the steps that ``takes`` names, over the memory of a runner, whose last block but one is for padding."""

    def __init__(
        self,
        model: Llama,
        keys_LPTGK: Tensor,
        values_LPTGK: Tensor,
        *,
        context: int,
        rows: int,
        is_flash: bool,
        compiler: str | None = None,
    ) -> None:
        """For sequences of up to ``context`` tokens, and up to ``rows`` rows or a few more. With a GPU and
        FlashAttention everything is captured here, and the log says how long it took. A ``compiler`` is a backend of
        ``torch.compile``.
        """
        self._model = model
        self._before, self._after = Block.before, Block.after
        if compiler is not None:
            # Not the whole step: all blocks share the code of these two, so that a size costs seconds and not minutes,
            # and the cache, which is written to between them, is out of the compiler's sight.
            self._before = torch.compile(Block.before, backend=compiler, options=_options(compiler))
            self._after = torch.compile(Block.after, backend=compiler, options=_options(compiler))
        self._keys_LPTGK, self._values_LPTGK = keys_LPTGK, values_LPTGK
        self._is_flash = is_flash
        self._block_tokens = keys_LPTGK.shape[2]
        self._padding_block = keys_LPTGK.shape[1] - 2
        self._sizes = row_sizes(rows)
        self._width = blocks_for(context, self._block_tokens)
        device = keys_LPTGK.device
        shape = (self._sizes[-1], 2 + self._width)
        has_graphs = device.type == "cuda"
        with torch.inference_mode(False):
            self._host = torch.zeros(shape, dtype=torch.int32, pin_memory=has_graphs)
            self._rows = torch.zeros(shape, dtype=torch.int32, device=device)
        self._numbers = self._host.numpy()
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] | None = {} if has_graphs else None
        self._pool = torch.cuda.graph_pool_handle() if has_graphs else None
        if has_graphs and is_flash:
            self._capture_all()

    def takes(self, batch: Batch) -> bool:
        """Whether a step can be run here: few tokens, and no adapter."""
        is_small = len(batch.tokens) <= self._sizes[-1] and max(batch.counts) <= _MOST_NEW
        return is_small and not any(batch.adapters)

    def run(self, batch: Batch) -> Tensor:
        """See ``Runner.run``."""
        rows = len(batch.tokens)
        size = next(size for size in self._sizes if size >= rows)
        self._numbers[:rows, 0] = batch.tokens
        self._numbers[rows:size, :3] = 0, 0, self._padding_block
        row, longest = 0, 1
        for start, count, table in zip(batch.starts, batch.counts, batch.tables, strict=True):
            blocks = blocks_for(start + count, self._block_tokens)
            self._numbers[row : row + count, 1] = range(start, start + count)
            self._numbers[row : row + count, 2 : 2 + blocks] = table[:blocks]
            row, longest = row + count, max(longest, blocks)
        self._rows[:size].copy_(self._host[:size])
        # What is gathered must not be as wide as the longest context that could be; a kernel that reads in place stops
        # where a sequence ends.
        width = self._width if self._is_flash else min(self._width, 1 << (longest - 1).bit_length())
        hidden_ND = self._hidden(size, width)[:rows]
        if len(batch.sampled) != rows:
            hidden_ND = hidden_ND[torch.tensor(batch.sampled, dtype=torch.int64).to(hidden_ND.device)]
        # Not captured: two kernels, for the rows that need them and not for those that pad, and the largest memory.
        return self._model.logits(hidden_ND)

    def _hidden(self, size: int, width: int) -> Tensor:
        if self._graphs is None:
            return self._compute(size, width)
        with torch.cuda.device(self._rows.device):
            if (size, width) not in self._graphs:
                self._graphs[size, width] = self._captured(size, width)
            graph, hidden_ND = self._graphs[size, width]
            graph.replay()
        return hidden_ND

    def _compute(self, size: int, width: int) -> Tensor:
        """The hidden states of a step. All that depends on the numbers in the rows happens on the device."""
        rows = self._rows[:size]
        tokens_N, positions_N, tables_NP = rows[:, 0].long(), rows[:, 1].long(), rows[:, 2 : 2 + width]
        block_N = tables_NP.gather(1, (positions_N // self._block_tokens)[:, None])[:, 0]
        slots_N = block_N * self._block_tokens + positions_N % self._block_tokens
        view: FlashView | RowsView
        if self._is_flash:
            view = FlashView(
                self._keys_LPTGK,
                self._values_LPTGK,
                positions_N=positions_N,
                slots_N=slots_N,
                ends_B=torch.arange(1, size + 1, dtype=torch.int32, device=rows.device),
                lengths_B=rows[:, 1] + 1,
                tables_BP=tables_NP,
                longest_new=1,
            )
        else:
            view = RowsView(
                self._keys_LPTGK, self._values_LPTGK, positions_N=positions_N, slots_N=slots_N, tables_NP=tables_NP
            )
        return self._model.hidden(tokens_N, view, self._run_block)

    def _run_block(self, block: Block, x_ND: Tensor, cosine_N1K: Tensor, sine_N1K: Tensor, cache: CacheView) -> Tensor:
        q_NHK, k_NGK, v_NGK = self._before(block, x_ND, cosine_N1K, sine_N1K)
        return self._after(block, x_ND, cache.attend(block.layer, q_NHK, k_NGK, v_NGK))

    @torch.inference_mode()
    def _capture_all(self) -> None:
        began = monotonic()
        self._rows[:, 2] = self._padding_block
        for size in reversed(self._sizes):  # the largest first: the others find room in its memory
            self._model.logits(self._hidden(size, self._width))  # which sets up what it needs, too
        torch.cuda.synchronize(self._rows.device)
        seconds = monotonic() - began
        logger.info("steps of up to %d tokens: %d CUDA graphs in %.1f s", self._sizes[-1], len(self._sizes), seconds)

    def _captured(self, size: int, width: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up in the first call, which cannot be captured
            self._compute(size, width)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden_ND = self._compute(size, width)
        return graph, hidden_ND


def _options(compiler: str) -> dict[str, str | int | bool | Callable[..., Any]] | None:
    # Only with it a product of a single row reads weights, rounded ones too, as fast as the memory gives them.
    return {"coordinate_descent_tuning": True} if compiler == "inductor" else None


def row_sizes(rows: int) -> list[int]:
    """The sizes to which steps are padded: powers of two and, from 8 on, what is halfway between; the last has room
    for ``rows``."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < rows:
        sizes.append(sizes[-1] * 4 // 3 if len(sizes) % 2 else sizes[-1] * 3 // 2)
    return sizes

"""A stand-in on the CPU for FlashAttention's kernel, which only GPUs have: what it is documented to do, and what it
refuses (``mha_varlen_fwd`` in torch's ``flash_attn/flash_api.cpp``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def flash_on_the_cpu(*, unwritten_rows: int = 0) -> Iterator[list[int]]:
    """Give torch's operator a kernel for CPUs within the block; the list has the new tokens of each call's longest.

    It can leave the last rows of its answer unwritten, as in pytorch issue 194167.
    """
    new_library: Any = torch.library.Library  # untyped
    library = new_library("aten", "IMPL")
    calls: list[int] = []

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cum_seq_q: Tensor,
        cum_seq_k: Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        seqused_k: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        block_table: Tensor | None = None,
        num_splits: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        assert seqused_k is not None
        assert block_table is not None
        assert num_splits == 1, "pytorch issue 194167"
        calls.append(max_q)
        sequences = len(cum_seq_q) - 1
        for numbers in (cum_seq_q, cum_seq_k, seqused_k, block_table):
            assert numbers.dtype == torch.int32
            assert numbers.stride(-1) == 1
        assert cum_seq_k.shape == (sequences + 1,)
        assert seqused_k.shape == (sequences,)
        assert seqused_k.is_contiguous()
        assert block_table.shape[0] == sequences
        assert key.shape == value.shape
        assert key.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
        assert key.shape[3] == query.shape[2]
        assert query.shape[2] % 8 == 0
        assert all(x.stride(-1) == 1 for x in (query, key, value))
        assert (window_size_left, window_size_right) in ((-1, -1), (-1, 0))
        assert torch.equal(cum_seq_k.diff(), seqused_k)
        output = torch.full_like(query, torch.nan)
        for row in range(sequences):
            first, end, used = int(cum_seq_q[row]), int(cum_seq_q[row + 1]), int(seqused_k[row])
            assert 0 < end - first <= max_q
            assert end - first <= used <= max_k
            blocks = block_table[row, : -(-used // key.shape[1])].long()
            k_SGK, v_SGK = (x[blocks].flatten(0, 1)[:used] for x in (key, value))
            mask = None
            if window_size_right == 0:  # the last query sees all, the one before it one less
                mask = torch.arange(used) <= torch.arange(used - (end - first), used)[:, None]
            q_1HTK, k_1GSK, v_1GSK = (x.transpose(0, 1)[None] for x in (query[first:end], k_SGK, v_SGK))
            attended = F.scaled_dot_product_attention(q_1HTK, k_1GSK, v_1GSK, attn_mask=mask, enable_gqa=True)
            output[first:end] = attended[0].transpose(0, 1)
        output[len(output) - unwritten_rows :] = torch.nan
        nothing = torch.empty(0)
        return output, nothing, nothing.clone(), nothing.clone(), nothing.clone()

    library.impl("_flash_attention_forward", kernel, "CPU")
    try:
        yield calls
    finally:
        library._destroy()

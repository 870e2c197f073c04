"""One network split over several processes, its ranks, by fairscale's layers (Shoeybi et al. 2019, arXiv:1909.08053).

    wq wk wv   columns: each rank has some of the heads   } no word between the ranks until
    wo         rows: what these heads add to the stream   } the ranks' sums are added up
    w1 w3      columns: some of the feed-forward's inner values
    w2         rows, added up alike
    embeddings, output    each rank some of the vocabulary: rows are added up, logits put side by side
    norms      whole, on every rank

Two sums a layer are all that the ranks tell each other, as raw numbers: over loopback sockets on CPUs, by NCCL on GPUs.
They find each other in a file of a folder that only its owner can enter; nothing is ever pickled.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from fairscale.nn.model_parallel import initialize_model_parallel
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region
from torch import Tensor, distributed, nn

from .config import LlamaConfig
from .model import Attention, Block, FeedForward, Llama

_SPLIT_BY_INPUTS = ("wo", "w2")


@dataclass(frozen=True)
class Rank:
    """One of the processes that run a network together."""

    number: int
    count: int
    rendezvous: Path
    """A folder for these ranks alone, empty at first."""

    def join(self, device: torch.device) -> None:
        """Wait for the others and make a group with them; once in a process. Raises what ``torch.distributed`` does."""
        if sys.platform == "linux":
            for backend in ("GLOO", "NCCL"):  # all ranks are on this machine, and nobody else shall reach them
                os.environ[f"{backend}_SOCKET_IFNAME"] = "lo"
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{self.rendezvous}/ranks",
            rank=self.number,
            world_size=self.count,
            device_id=device if device.type == "cuda" else None,
        )
        initialize_model_parallel(self.count)

    def part(self, name: str, weight_W: Tensor) -> Tensor:
        """The view of a whole weight that this rank has; all of it for a norm."""
        if "norm" in name:
            return weight_W
        return weight_W.chunk(self.count, int(is_split_by_inputs(name.removesuffix(".weight"))))[self.number]


def is_split_by_inputs(matrix: str) -> bool:
    """Whether the ranks share a matrix by its inputs, so that their products are added up; else by its outputs."""
    return matrix.endswith(_SPLIT_BY_INPUTS)


def sum_over_ranks(part: Tensor) -> Tensor:
    """The sum of what all ranks have here."""
    total: Tensor = reduce_from_model_parallel_region(part)
    return total


def possible_ranks(config: LlamaConfig, most: int) -> list[int]:
    """Into how many ranks, up to ``most``, the network can be split: everything must come out even."""
    sizes = (config.n_heads, config.n_kv_heads, config.ffn_dim, config.vocab_size)
    return [ranks for ranks in range(1, most + 1) if not any(size % ranks for size in sizes)]


def empty_part(config: LlamaConfig, *, device: torch.device | str, dtype: torch.dtype) -> Llama:
    """This rank's part of a network, with weights that hold anything. ``Rank.join`` comes first."""
    model = Llama(config, device="meta", dtype=dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fairscale's layers have no such parameter
    try:
        for block in model.layers:
            assert isinstance(block, Block)
            _split_block(block)
        model.tok_embeddings = VocabParallelEmbedding(config.vocab_size, config.dim, init_method=_untouched)
        model.output = _columns(config.dim, config.vocab_size, gather_output=True)
    finally:
        torch.set_default_dtype(before)
    model.to_empty(device=device)
    if config.tied_embeddings:
        assert model.output is not None
        model.output.weight = model.tok_embeddings.weight
    return model


def _split_block(block: Block) -> None:
    attention, feed_forward = block.attention, block.feed_forward
    assert isinstance(attention, Attention)
    assert isinstance(feed_forward, FeedForward)
    for owner, columns, rows in ((attention, ("wq", "wk", "wv"), "wo"), (feed_forward, ("w1", "w3"), "w2")):
        for name in columns:
            whole = owner.get_submodule(name)
            assert isinstance(whole, nn.Linear)
            setattr(owner, name, _columns(whole.in_features, whole.out_features))
        whole = owner.get_submodule(rows)
        assert isinstance(whole, nn.Linear)
        split = RowParallelLinear(
            whole.in_features, whole.out_features, bias=False, input_is_parallel=True, init_method=_untouched
        )
        setattr(owner, rows, split)


def _columns(inputs: int, outputs: int, *, gather_output: bool = False) -> nn.Linear:
    split: nn.Linear = ColumnParallelLinear(
        inputs, outputs, bias=False, gather_output=gather_output, init_method=_untouched
    )
    return split


def _untouched(weight_W: Tensor) -> Tensor:
    return weight_W

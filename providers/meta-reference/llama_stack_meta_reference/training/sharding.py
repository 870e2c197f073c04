"""Weights, gradients and optimiser state shared out among ranks (FSDP2; Zhao et al. 2023, arXiv:2304.11277).

The units that are gathered for as long as they work are the layers; the rest, with embeddings, last norm and output, is
one more, or with ``is_wrapped_fsdp`` three. Matrices in NF4 are not shared out: each rank has them all.
"""

from __future__ import annotations

from functools import partial

from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from .network import Network
from .plan import TrainingSettings
from .ranks import Ranks


def shard(network: Network, ranks: Ranks, settings: TrainingSettings) -> None:
    """Share a network on the CPU out among ranks, on their devices; a process that is alone keeps all of it."""
    if ranks.mesh is None:
        return
    is_offloaded = settings.is_offloaded_fsdp and ranks.device.type == "cuda"
    unit = partial(fully_shard, mesh=ranks.mesh, offload_policy=CPUOffloadPolicy() if is_offloaded else OffloadPolicy())
    for layer in network.llama.layers:
        unit(layer)
    # A table that is the output too is needed in both places at once, which the outermost unit is there for.
    if settings.is_wrapped_fsdp and not network.llama.config.tied_embeddings:
        unit(network.llama.tok_embeddings)
        unit(network.head)
    unit(network)

"""How much memory a model takes, from its sizes alone: an operator learns before loading what will not fit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..llama.config import LlamaConfig
from .kv_cache import BLOCK_TOKENS, blocks_for
from .runner import Storage

_MEMINFO = Path("/proc/meminfo")
# Files of a container's limit and use, and the line of its memory.stat with what can be reclaimed: cgroup v2, then v1.
_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one model with its cache; activations of a step come on top. ``str()`` is one line for an operator."""

    device: str
    weight_bytes: int
    loading_bytes: int
    """What the weights take at the most while they are loaded; more than they do later where they are rounded."""
    cache_bytes_per_token: int
    context: int
    """The most tokens of one sequence."""
    blocks: int
    """How many blocks the cache has; all sequences share them."""
    block_tokens: int
    available_bytes: int
    """What was free on the device when the plan was made."""
    longest_context: int
    """The most tokens that one sequence could have with a cache of all that is free, up to the model's limit."""

    @property
    def cache_tokens(self) -> int:
        """How many tokens all sequences have together."""
        return self.blocks * self.block_tokens

    @property
    def cache_bytes(self) -> int:
        """The whole cache."""
        return self.cache_bytes_per_token * self.cache_tokens

    @property
    def total_bytes(self) -> int:
        """Weights and cache together."""
        return self.weight_bytes + self.cache_bytes

    @property
    def fits(self) -> bool:
        """Whether weights, then weights and cache, are within what was free, and the cache holds a whole context."""
        most = max(self.loading_bytes, self.total_bytes)
        return most <= self.available_bytes and 0 < self.context <= self.cache_tokens

    def __str__(self) -> str:
        loading = f" ({_size(self.loading_bytes)} while loaded)" if self.loading_bytes > self.weight_bytes else ""
        return (
            f"{self.device}: weights {_size(self.weight_bytes)}{loading} + cache {_size(self.cache_bytes)} "
            f"({self.cache_tokens} tokens of {_size(self.cache_bytes_per_token)}) = "
            f"{_size(self.total_bytes)} of {_size(self.available_bytes)} free; "
            f"context {self.context} tokens, longest that fits: {self.longest_context}"
        )


def memory_plan(
    config: LlamaConfig,
    storage: Storage,
    device: torch.device | str,
    *,
    available_bytes: int,
    share: float = 1.0,
    max_sequences: int = 1,
    context_tokens: int | None = None,
    cache_tokens: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
) -> MemoryPlan:
    """Plan the cache beside the weights.

    With ``cache_tokens`` it holds at least so many. Else it has ``max_sequences`` contexts, or as many whole blocks as
    are within ``share`` of what is available, but never less than one ``context_tokens``. The context is
    ``context_tokens``, else the model's own or the whole cache, if that is less.
    """
    weight_bytes, bytes_per_token = storage.weight_bytes(config), storage.cache_bytes_per_token(config)

    def fitting(available: int) -> int:
        return max(0, available - weight_bytes) // (bytes_per_token * block_tokens)

    loading_bytes = storage.loading_bytes(config)
    longest = fitting(available_bytes) * block_tokens if loading_bytes <= available_bytes else 0
    wanted = context_tokens or config.max_context
    if cache_tokens is not None:
        blocks = blocks_for(cache_tokens, block_tokens)
    else:
        blocks = min(max_sequences * blocks_for(wanted, block_tokens), fitting(int(available_bytes * share)))
        if context_tokens is not None:
            blocks = max(blocks, blocks_for(context_tokens, block_tokens))
    return MemoryPlan(
        device=str(device),
        weight_bytes=weight_bytes,
        loading_bytes=loading_bytes,
        cache_bytes_per_token=bytes_per_token,
        context=context_tokens or min(wanted, blocks * block_tokens),
        blocks=blocks,
        block_tokens=block_tokens,
        available_bytes=available_bytes,
        longest_context=min(longest, config.max_context),
    )


def available_memory(device: torch.device | str) -> int:
    """Return the bytes that can still be taken: a GPU's free memory, else the machine's or the container's, if less."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    container = _container_memory()
    return _machine_memory() if container is None else min(_machine_memory(), container)


def _container_memory() -> int | None:
    """What is left under the container's limit; None where there is no container, or no limit."""
    for folder, limit_file, use_file, reclaimable in _CGROUPS:
        if (folder / limit_file).exists():
            limit = (folder / limit_file).read_text().strip()
            if limit == "max":
                return None
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Files that were read count as used until their place is needed: a checkpoint just copied would stand in
            # its own way.
            used = int((folder / use_file).read_text()) - int(statistics[reclaimable])
            return max(0, int(limit) - used)
    return None


def _machine_memory() -> int:
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"

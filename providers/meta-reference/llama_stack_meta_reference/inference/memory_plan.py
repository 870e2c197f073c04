"""How much memory a model takes, from its sizes alone: an operator learns before loading what will not fit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..llama.config import LlamaConfig
from .kv_cache import cache_bytes

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
    cache_bytes_per_token: int
    context: int
    """Tokens of each sequence that the plan is for."""
    sequences: int
    available_bytes: int
    """What was free on the device when the plan was made."""
    longest_context: int
    """The most tokens a sequence could have with all ``sequences`` in memory, up to the model's limit; 0 if none."""

    @property
    def cache_bytes(self) -> int:
        """The whole cache: every sequence at its full context."""
        return self.cache_bytes_per_token * self.context * self.sequences

    @property
    def total_bytes(self) -> int:
        """Weights and cache together."""
        return self.weight_bytes + self.cache_bytes

    @property
    def fits(self) -> bool:
        """Whether weights and cache are within what was free."""
        return self.total_bytes <= self.available_bytes

    def __str__(self) -> str:
        return (
            f"{self.device}: weights {_size(self.weight_bytes)} + cache {_size(self.cache_bytes)} "
            f"({self.sequences} x {self.context} tokens of {_size(self.cache_bytes_per_token)}) = "
            f"{_size(self.total_bytes)} of {_size(self.available_bytes)} free; "
            f"longest context for {self.sequences} at once: {self.longest_context} tokens"
        )


def memory_plan(
    config: LlamaConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    context: int,
    sequences: int,
    *,
    available_bytes: int | None = None,
) -> MemoryPlan:
    """Plan ``sequences`` sequences of ``context`` tokens; free bytes are asked of the device unless given."""
    available = available_memory(device) if available_bytes is None else available_bytes
    weight_bytes = config.parameter_count * dtype.itemsize
    bytes_per_token = cache_bytes(config, 1, dtype)
    fitting = max(0, available - weight_bytes) // (bytes_per_token * sequences)
    return MemoryPlan(
        device=str(device),
        weight_bytes=weight_bytes,
        cache_bytes_per_token=bytes_per_token,
        context=context,
        sequences=sequences,
        available_bytes=available,
        longest_context=min(fitting, config.max_context),
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

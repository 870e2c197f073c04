"""The processes that train together: alone, or as torchrun started them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from llama_stack.errors import SetupError


@dataclass(frozen=True)
class Ranks:
    """One process among ``count``; alone it is number 0 of 1."""

    number: int
    count: int
    device: torch.device
    mesh: DeviceMesh | None
    """None for a process that is alone."""

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all ranks, which must all call this."""
        if self.count == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return [float(value) for value in summed]

    def meet(self) -> None:
        """Wait for all ranks."""
        self.sums([0.0])


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, or stay alone. Raises ``SetupError`` for a device that is not there."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks(0, 1, device_of(device), None)
        return
    here = device_of(device, int(os.environ["LOCAL_RANK"]))
    if here.type == "cuda":
        torch.cuda.set_device(here)
    # Offloaded weights are reduced on the CPU, so a GPU's ranks know both ways to each other.
    dist.init_process_group("cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), count, here, init_device_mesh(here.type, (count,)))
    finally:
        dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out, on the CPU; the ranks must all call this."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu()


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """``value`` shared out as ``tensor`` is, on its device."""
    if isinstance(tensor, DTensor):
        return distribute_tensor(value.to(tensor.device_mesh.device_type), tensor.device_mesh, tensor.placements).to(
            tensor.device
        )
    return value.to(tensor.device)


def product_type(precision: str, device: torch.device) -> torch.dtype:
    """What products are computed in on a device, where ``precision`` is as in ``TrainingSettings``."""
    if precision == "auto":
        # A CPU's losses are the same on any other: not all have units for 16 bits.
        has_units = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_units else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def products_in(dtype: torch.dtype, device: torch.device) -> torch.autocast | nullcontext[None]:
    """Within it, products of float32 tensors are computed in ``dtype``."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def device_of(name: str, local_rank: int | None = None) -> torch.device:
    """The device of a name such as ``auto`` or ``cuda:1``. Raises ``SetupError`` for one that is not there."""
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_gpu else "cpu"
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise SetupError(f"device {name}: it must be cpu or cuda")
    if device.type == "cpu":
        return device
    index = local_rank if local_rank is not None else device.index or 0
    if not has_gpu or index >= torch.cuda.device_count():
        raise SetupError(f"device {name}: there are {torch.cuda.device_count()} GPUs here")
    return torch.device("cuda", index)

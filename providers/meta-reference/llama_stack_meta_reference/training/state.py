"""What a resumption needs besides the plan: the trained weights in full, and what the optimiser knows of each.

    state.json                iters, the plan's fingerprint, and what the optimiser keeps of a weight
    weights.safetensors       by the names of ``Network``, float32, whatever type the checkpoint itself is stored in
    optimizer.safetensors     NAME:KEY, float32

Whole tensors, so that any number of ranks can go on from what any other number saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llama_stack.errors import CheckpointError, InvalidRequestError

from ..llama.checkpoint import inside, read_json
from ..llama.safetensors_weights import read_header
from .ranks import like, whole


def whole_state(trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimiser knows, by NAME:KEY; the ranks must all call this."""
    return {
        f"{name}:{key}": whole(kept).clone()
        for name, weight in trained.items()
        for key, kept in optimizer.state.get(weight, {}).items()
        if isinstance(kept, Tensor)
    }


def write_state(
    folder: Path, iters: int, fingerprint: str, trained: dict[str, Tensor], optimizer: dict[str, Tensor]
) -> None:
    """Write a new folder of whole tensors."""
    folder.mkdir()
    keys = sorted({name.rpartition(":")[2] for name in optimizer})
    values = {"iters": iters, "plan": fingerprint, "optimizer": keys}
    (folder / "state.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    save_file(trained, folder / "weights.safetensors")
    save_file(optimizer, folder / "optimizer.safetensors")


@torch.no_grad()
def restore(
    folder: Path,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    fingerprint: str,
    total_iters: int,
) -> int:
    """Fill weights and optimiser with what was saved; returns after how many iterations that was.

    Raises ``InvalidRequestError`` where it was for another plan, ``CheckpointError`` where it does not fit.
    """
    values = read_json(inside(folder, "state.json"))
    if values.get("plan") != fingerprint:
        raise InvalidRequestError(
            f"{folder.parent.name} is of another plan than the job's: settings or rows have changed since; "
            "start a new job with them"
        )
    iters, keys = values.get("iters"), values.get("optimizer")
    if type(iters) is not int or not 0 < iters <= total_iters or not isinstance(keys, list):
        raise CheckpointError(f"{folder}/state.json: iters must be from 1 to {total_iters}; found {str(iters)[:40]}")
    weights = inside(folder, "weights.safetensors")
    moments = inside(folder, "optimizer.safetensors")
    for name, weight in trained.items():
        weight.copy_(like(read_tensor(weights, name, tuple(weight.shape)), weight))
        kept = optimizer.state[weight]
        for key in keys:
            if key == "step":
                kept[key] = read_tensor(moments, f"{name}:{key}", ()).to(weight.device)
            else:
                kept[key] = like(read_tensor(moments, f"{name}:{key}", tuple(weight.shape)), weight)
    return iters


def read_tensor(path: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor of a safetensors file. Raises ``CheckpointError`` unless it is there and of that shape."""
    try:
        read_header(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            found: Tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error)[:200]}") from None
    if tuple(found.shape) != shape or found.dtype != torch.float32:
        raise CheckpointError(
            f"{path}: {name} is {found.dtype} of shape {list(found.shape)}; needed: float32 of {list(shape)}"
        )
    return found

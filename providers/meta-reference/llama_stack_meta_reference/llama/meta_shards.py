"""Meta's ``consolidated.NN.pth`` files: each holds one rank's part of every weight, split as fairscale's parallel
layers split it.

    wq wk wv w1 w3 output    rows (dim 0), each rank some heads or some outputs
    wo w2                    columns (dim 1), each rank the inputs that the former gave it
    tok_embeddings           columns in older releases, rows (the vocabulary) in newer ones: told apart by shape
    norms                    whole, on every rank

These files are pickles. They are read with ``weights_only``, by a torch without the known holes in it, after
``shard_archive`` has looked through the archive. That is for folders that the operator names in the distribution: no
request can name one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from llama_stack.errors import CheckpointError

from .config import LlamaConfig
from .shard_archive import check_archive, first_line

# Below this, weights_only could be led out of its limits (CVE-2025-32434, CVE-2026-24747).
_OLDEST_TORCH = "2.10"
# Angles that old releases stored beside the weights; they follow from params.json.
_IGNORED = frozenset({"rope.freqs"})

_SPLIT_BY_ROWS = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight")
_BY_HEAD = ("wq.weight", "wk.weight")
_SPLIT_BY_COLUMNS = ("wo.weight", "w2.weight")


class MetaShards:
    """All shards of one checkpoint, mapped, not read: a weight is read when it is copied."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Map the files, in rank order. Raises CheckpointError for what is not a plain archive of float tensors."""
        self.paths = tuple(paths)
        self._shards = [_load_shard(path) for path in paths]
        self.names = frozenset(self._shards[0].keys() - _IGNORED)
        for path, shard in zip(self.paths, self._shards, strict=True):
            differing = sorted(self.names ^ (shard.keys() - _IGNORED))
            if differing:
                raise CheckpointError(
                    f"{path}: its tensors differ from those of {self.paths[0].name}: {', '.join(differing[:5])}"
                )

    def stored_name(self, name: str) -> str:
        """How the files call a weight: model.py has Meta's names."""
        return name

    def dtype(self, name: str) -> torch.dtype:
        """How a weight is stored."""
        return self._shards[0][name].dtype

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError unless the parts of one weight make up ``shape``."""
        axis = self._axis(name, shape)
        for path, part in zip(self.paths, self._parts(name), strict=True):
            expected = list(shape)
            if axis is not None:
                expected[axis] //= len(self.paths)
            if list(part.shape) != expected:
                raise CheckpointError(
                    f"{path}: {name} has shape {list(part.shape)}; its part of {list(shape)} is {expected}"
                )

    def copy_into(self, name: str, weight: Tensor, config: LlamaConfig) -> None:
        """Fill a whole weight from its parts, turning query and key rows from Meta's rotary order into model.py's."""
        axis = self._axis(name, tuple(weight.shape))
        if axis is None:
            first, *others = self._parts(name)
            if not all(_are_same(first, other) for other in others):
                raise CheckpointError(
                    f"{self.paths[0].parent}: {name} differs between shards: they are of different models"
                )
            weight.copy_(first)
            return
        for target, part in zip(weight.chunk(len(self.paths), axis), self._parts(name), strict=True):
            target.copy_(part)
        if name.endswith(_BY_HEAD):
            # Meta turns neighbours (2i, 2i + 1), model.py halves (i, i + K/2): the same pairs elsewhere in the head.
            pairs = weight.view(-1, config.head_dim // 2, 2, weight.shape[1])
            weight.copy_(pairs.transpose(1, 2).reshape(weight.shape))

    def _axis(self, name: str, shape: tuple[int, ...]) -> int | None:
        if name.endswith(_SPLIT_BY_ROWS):
            axis = 0
        elif name.endswith(_SPLIT_BY_COLUMNS):
            axis = 1
        elif name == "tok_embeddings.weight":
            axis = 0 if self._shards[0][name].shape[-1:] == shape[1:] else 1
        else:
            return None
        if shape[axis] % len(self.paths):
            raise CheckpointError(
                f"{self.paths[0].parent}: {name}: {len(self.paths)} shards do not divide {shape[axis]}"
            )
        return axis

    def _parts(self, name: str) -> list[Tensor]:
        return [shard[name] for shard in self._shards]


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Whether the numbers are equal, NaN included, in whichever types the ranks store them."""
    return torch.allclose(one.double(), other.double(), rtol=0, atol=0, equal_nan=True)


def _load_shard(path: Path) -> Mapping[str, Tensor]:
    if TorchVersion(torch.__version__) < _OLDEST_TORCH:
        raise CheckpointError(
            f"{path}: .pth files are read only with torch {_OLDEST_TORCH} or newer; found {torch.__version__}"
        )
    check_archive(path)
    try:
        shard = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive fails in many ways, none of which torch documents
        raise CheckpointError(
            f"{path}: torch cannot load it as plain weights: {type(error).__name__}: {first_line(error)}"
        ) from None
    if not isinstance(shard, dict) or not shard:
        raise CheckpointError(f"{path}: must hold a dictionary of tensors; found {type(shard).__name__}")
    for name, tensor in shard.items():
        if not (isinstance(name, str) and isinstance(tensor, Tensor) and tensor.is_floating_point()):
            raise CheckpointError(f"{path}: {name!r} is not a plain floating-point tensor")
    return shard

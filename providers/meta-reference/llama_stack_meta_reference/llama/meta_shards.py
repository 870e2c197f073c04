"""Meta's ``consolidated.NN.pth`` files: each holds one rank's part of every weight, split as fairscale's parallel
layers split it.

    wq wk wv w1 w3 output    rows (dim 0), each rank some heads or some outputs
    wo w2                    columns (dim 1), each rank the inputs that the former gave it
    tok_embeddings           columns in older releases, rows (the vocabulary) in newer ones: told apart by shape
    norms                    whole, on every rank

These files are pickles. They are read with ``weights_only`` by a torch without the known holes in it, from a plain zip
archive whose sizes were checked first; nothing else in a pickle is built.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from llama_stack.errors import CheckpointError

from .config import LlamaConfig

# Below this, weights_only could be led out of its limits (CVE-2025-32434, CVE-2026-24747).
_OLDEST_TORCH = "2.10"
# The pickle of a shard names its tensors; Llama 3.1 405B's needs 250 kB.
_LARGEST_PICKLE_BYTES = 16_000_000
_MOST_ARCHIVE_MEMBERS = 100_000
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
            if not all(torch.equal(first, other) for other in others):
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


def _load_shard(path: Path) -> Mapping[str, Tensor]:
    if TorchVersion(torch.__version__) < _OLDEST_TORCH:
        raise CheckpointError(
            f"{path}: .pth files are read only with torch {_OLDEST_TORCH} or newer; found {torch.__version__}"
        )
    _check_archive(path)
    try:
        shard = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive fails in many ways, none of which torch documents
        raise CheckpointError(
            f"{path}: torch cannot load it as plain weights: {type(error).__name__}: {_first_line(error)}"
        ) from None
    if not isinstance(shard, dict) or not shard:
        raise CheckpointError(f"{path}: must hold a dictionary of tensors; found {type(shard).__name__}")
    for name, tensor in shard.items():
        is_plain = isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        if not is_plain or tensor.is_quantized or not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name!r} is not a plain floating-point tensor")
    return shard


def _check_archive(path: Path) -> None:
    """Refuse what torch.load would unpack before looking: compressed members, a huge pickle, anything but a zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(
            f"{path}: not a complete zip archive as torch.save writes it: cut short, or of another kind "
            f"({_first_line(error)})"
        ) from None
    if len(members) > _MOST_ARCHIVE_MEMBERS:
        raise CheckpointError(f"{path}: {len(members)} archive members; at most {_MOST_ARCHIVE_MEMBERS} are read")
    stored_bytes = 0
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise CheckpointError(
                f"{path}: archive member {member.filename[:80]!r} is compressed; torch.save never does that"
            )
        if member.filename.endswith(".pkl") and member.file_size > _LARGEST_PICKLE_BYTES:
            raise CheckpointError(
                f"{path}: a pickle of {member.file_size} bytes; at most {_LARGEST_PICKLE_BYTES} are read"
            )
        stored_bytes += member.file_size
    if stored_bytes > path.stat().st_size:
        raise CheckpointError(f"{path}: its members claim {stored_bytes} bytes, more than the file has")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]

"""Weights in safetensors files under Hugging Face's names, each file checked against its own header before anything
maps it.

Format: https://huggingface.co/docs/safetensors, "Format": 8 bytes of header length, a JSON header, then the data
without gaps. A declared size that the file does not have is how a crafted file makes a reader look beyond its end
(CVE-2026-7482 in another server).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llama_stack.errors import CheckpointError

from .config import LlamaConfig

# The 1,138 tensors of Llama 3.1 405B need 150 kB; 2 MB of hostile JSON stay below 64 MB when parsed.
_LARGEST_HEADER_BYTES = 2_000_000
_MOST_DIMENSIONS = 8

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The types of weights that are what they stand for."""

# model.py's part of a name -> Hugging Face's.
_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "layers": "model.layers",
    "attention": "self_attn",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward": "mlp",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}
_NAMES_BACK = {theirs.removeprefix("model."): ours for ours, theirs in _NAMES.items()}
# Angles that older releases of transformers stored beside the weights; they follow from config.json.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def hugging_face_name(name: str) -> str:
    """Translate ``layers.0.attention.wq.weight`` to ``model.layers.0.self_attn.q_proj.weight``."""
    return ".".join(_NAMES.get(part, part) for part in name.split("."))


class SafetensorsWeights:
    """The tensors of one or more safetensors files, by model.py's names; a name that has none stays as it is."""

    def __init__(self, paths: Sequence[Path], *, has_rounded: bool = False) -> None:
        """Read the headers. Raises CheckpointError for a bad one, a tensor given twice and one that is not of floats,
        unless there ``has_rounded`` ones."""
        self._entries: dict[str, TensorEntry] = {}
        self._files: dict[str, Path] = {}
        for path in paths:
            for stored_name, entry in read_header(path).items():
                if _IGNORED.fullmatch(stored_name):
                    continue
                name = model_name(stored_name)
                if name in self._files:
                    raise CheckpointError(f"{path}: {stored_name} stands in {self._files[name].name} too")
                if not has_rounded and entry.dtype not in FLOATS:
                    raise CheckpointError(f"{path}: {stored_name} is {entry.dtype}; weights must be floating-point")
                self._entries[name], self._files[name] = entry, path
        self.names = frozenset(self._entries)

    def stored_name(self, name: str) -> str:
        """How the files call a weight."""
        return hugging_face_name(name)

    def dtype(self, name: str) -> torch.dtype:
        """How a weight is stored."""
        return self._entries[name].dtype

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError unless a weight has ``shape``."""
        found = self._entries[name].shape
        if found != shape:
            raise CheckpointError(
                f"{self._files[name]}: {hugging_face_name(name)} has shape {list(found)}; "
                f"config.json needs {list(shape)}"
            )

    def check_dtype(self, name: str, possible: Collection[torch.dtype]) -> None:
        """Raise CheckpointError unless a weight is stored in one of these types."""
        found = self._entries[name].dtype
        if found not in possible:
            raise CheckpointError(
                f"{self._files[name]}: {hugging_face_name(name)} is {found}; "
                f"config.json needs {' or '.join(map(str, possible))}"
            )

    def copy_into(self, name: str, weight: Tensor, config: LlamaConfig) -> None:
        """Fill a weight from its file."""
        with safe_open(self._files[name], framework="pt", device="cpu") as file:
            weight.copy_(file.get_tensor(hugging_face_name(name)))


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor that a weight file holds."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file by name.

    Raises CheckpointError unless the header is well-formed, every dtype is known, each span is exactly as long as shape
    and dtype say, and the spans fill the file from the header's end to its last byte, without gap or overlap.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path}: cut short: {size} bytes, but the header alone takes {8 + length}")
        if length > _LARGEST_HEADER_BYTES:
            raise CheckpointError(f"{path}: a header of {length} bytes; at most {_LARGEST_HEADER_BYTES} are read")
        header = _parse(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in the header must map names to texts")
    spans: list[tuple[int, int, str]] = []
    entries: dict[str, TensorEntry] = {}
    for name, description in header.items():
        entries[name], start, end = _entry(path, name, description)
        spans.append((start, end, name))
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            raise CheckpointError(
                f"{path}: tensor {name!r} starts at byte {start} of the data; the one before ends at {position}"
            )
        position = end
    if 8 + length + position != size:
        raise CheckpointError(
            f"{path}: {size} bytes, but the header describes {8 + length + position}: cut short or damaged"
        )
    return entries


def model_name(stored_name: str) -> str:
    """The opposite of ``hugging_face_name``; a name that is none of its results stays as it is."""
    name = ".".join(_NAMES_BACK.get(part, part) for part in stored_name.removeprefix("model.").split("."))
    return name if hugging_face_name(name) == stored_name else stored_name


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _entry(path: Path, name: str, description: Any) -> tuple[TensorEntry, int, int]:
    if not isinstance(description, dict) or description.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: tensor {name!r}: the header must give dtype, shape and data_offsets")
    dtype = _DTYPES.get(description["dtype"]) if isinstance(description["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{path}: tensor {name!r}: unknown dtype {str(description['dtype'])[:40]!r}; known: {', '.join(_DTYPES)}"
        )
    shape, offsets = description["shape"], description["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise CheckpointError(f"{path}: tensor {name!r}: shape must be up to {_MOST_DIMENSIONS} whole numbers")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: tensor {name!r}: data_offsets must be two whole numbers in order")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{path}: tensor {name!r}: {math.prod(shape)} elements of {description['dtype']} take "
            f"{math.prod(shape) * dtype.itemsize} bytes, but its span has {offsets[1] - offsets[0]}"
        )
    return TensorEntry(dtype, tuple(shape)), offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 48 for number in value)

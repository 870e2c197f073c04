"""LoRA adapters: what fine-tuning adds to a model's matrices (Hu et al. 2021, arXiv:2106.09685), in peft's layout.

    y = W x + up (down x)        down (rank, inputs), up (outputs, rank), the scale alpha / rank within up

A folder as peft writes it: ``adapter_config.json`` and ``adapter_model.safetensors``. Only what changes the seven
matrices of a layer this way is read; whatever else a config asks for is refused by its name.

Shape suffixes: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_stack.errors import CheckpointError

from .checkpoint import inside, read_json
from .config import LlamaConfig
from .safetensors_weights import model_name, read_header

TARGETS = {
    "wq": "attention.wq",
    "wk": "attention.wk",
    "wv": "attention.wv",
    "wo": "attention.wo",
    "w1": "feed_forward.w1",
    "w3": "feed_forward.w3",
    "w2": "feed_forward.w2",
}
"""The matrices of a layer that an adapter can add to, in the order of a layer's work."""

_LARGEST_RANK = 512
_LARGEST_ALPHA = 1_000_000
_TENSOR = re.compile(r"base_model\.model\.(model\.layers\.\d{1,4}\.\w+\.\w+)\.lora_([AB])\.weight")
# Field of adapter_config.json -> the values with which an adapter is plain LoRA.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "use_qalora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "alora_invocation_tokens": ([],),
    "layer_replication": ([],),
    "megatron_config": (),
    "target_parameters": ([],),
    # Others begin by taking from the base what they then add to it (PiSSA, arXiv:2404.02948): this base has it still.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
    "kasa_config": (),
    "arrow_config": (),
    "use_bdlora": (False,),
}


class Pair(NamedTuple):
    """What is added to one matrix."""

    down_RI: Tensor
    up_OR: Tensor


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter in memory, float32 on the CPU."""

    rank: int
    scale: float
    """What ``up`` is multiplied by in ``pairs``: alpha / rank, or alpha / sqrt(rank)."""
    pairs: Mapping[str, Pair]
    """By the matrix's name in model.py, such as ``layers.0.attention.wq``."""


def load_adapter(folder: Path, config: LlamaConfig) -> LoraAdapter:
    """Read the adapter in ``folder``, which must be made for networks of these sizes.

    Raises CheckpointError that says what was found, what is missing and where.
    """
    try:
        return _load(folder, config)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the adapter cannot be read: {error}") from None


def _load(folder: Path, config: LlamaConfig) -> LoraAdapter:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    file = inside(folder, "adapter_config.json")
    rank, scale = _rank_and_scale(file, read_json(file))
    weights = inside(folder, "adapter_model.safetensors")
    stored: dict[str, dict[str, str]] = {}
    shapes = _shapes(config, rank)
    for name, entry in read_header(weights).items():
        found = _TENSOR.fullmatch(name)
        matrix = model_name(f"{found[1]}.weight").removesuffix(".weight") if found else None
        if found is None or matrix not in shapes:
            raise CheckpointError(f"{weights}: {name[:120]} adds to no matrix of this network that can be adapted")
        expected = shapes[matrix][found[2] == "B"]
        if entry.shape != expected or not entry.dtype.is_floating_point:
            raise CheckpointError(
                f"{weights}: {name} is {entry.dtype} of shape {list(entry.shape)}; needed: floats of {list(expected)}"
            )
        stored.setdefault(matrix, {})[found[2]] = name
    lonely = sorted(matrix for matrix, halves in stored.items() if len(halves) != 2)
    if lonely or not stored:
        what = f"{lonely[0]} has lora_A or lora_B alone" if lonely else "it is empty"
        raise CheckpointError(f"{weights}: {what}")
    with safe_open(weights, framework="pt", device="cpu") as tensors:
        pairs = {
            matrix: Pair(tensors.get_tensor(halves["A"]).float(), tensors.get_tensor(halves["B"]).float() * scale)
            for matrix, halves in stored.items()
        }
    for matrix, pair in pairs.items():
        if not all(bool(half.isfinite().all()) for half in pair):
            raise CheckpointError(f"{weights}: what it adds to {matrix} holds NaN or infinity")
    return LoraAdapter(rank, scale, pairs)


def _rank_and_scale(file: Path, values: Mapping[str, Any]) -> tuple[int, float]:
    for key, plain in _PLAIN.items():
        value = values.get(key)
        if value is not None and value not in plain:
            raise CheckpointError(f"{file}: {key} {str(value)[:80]!r} is not supported; plain LoRA is")
    rank, alpha, is_stabilised = values.get("r"), values.get("lora_alpha"), values.get("use_rslora", False)
    if type(rank) is not int or not 1 <= rank <= _LARGEST_RANK:
        raise CheckpointError(f"{file}: r must be a whole number from 1 to {_LARGEST_RANK}; found {str(rank)[:80]}")
    # Compared, not converted: JSON's whole numbers may be larger than any float.
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) <= _LARGEST_ALPHA:
        raise CheckpointError(
            f"{file}: lora_alpha must be a number of at most {_LARGEST_ALPHA}; found {str(alpha)[:80]}"
        )
    if not isinstance(is_stabilised, bool):
        raise CheckpointError(f"{file}: use_rslora must be true or false; found {str(is_stabilised)[:80]}")
    # Kalajdzievski 2023, arXiv:2312.03732
    return rank, alpha / (math.sqrt(rank) if is_stabilised else rank)


def _shapes(config: LlamaConfig, rank: int) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """The shapes of both halves, by the name of each matrix that can be adapted."""
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    sizes = {  # outputs, inputs
        "wq": (queries, config.dim),
        "wk": (keys, config.dim),
        "wv": (keys, config.dim),
        "wo": (config.dim, queries),
        "w1": (config.ffn_dim, config.dim),
        "w3": (config.ffn_dim, config.dim),
        "w2": (config.dim, config.ffn_dim),
    }
    return {
        f"layers.{layer}.{TARGETS[target]}": ((rank, inputs), (outputs, rank))
        for layer in range(config.n_layers)
        for target, (outputs, inputs) in sizes.items()
    }

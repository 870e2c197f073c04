"""Rounded weights in safetensors files: what ``save_hugging_face`` writes of a rounded network.

Each matrix is two tensors, ``....q_proj.weight`` and ``....q_proj.scale``, as quantize.py keeps them; the rest is as in
any other folder, and a tied output is not stored. ``config.json`` names the type in its ``quantization_config``, which
other readers refuse, as they must.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_stack.errors import CheckpointError

from .config import LlamaConfig
from .quantize import KINDS, RoundedLinear, empty_rounded, stored_matrices
from .safetensors_weights import FLOATS, SafetensorsWeights

_METHOD = "llama-stack"


def described(kind: str) -> dict[str, str]:
    """The ``quantization_config`` of a folder with matrices of one of ``quantize.KINDS``."""
    return {"quant_method": _METHOD, "dtype": kind}


def stored_kind(config: Mapping[str, Any]) -> str | None:
    """Which of ``quantize.KINDS`` a ``config.json`` names; None for a folder that is not of our making."""
    return next((kind for kind in KINDS if config.get("quantization_config") == described(kind)), None)


class RoundedWeights:
    """The weights of one folder, by model.py's names, as ``SafetensorsWeights`` has those of others."""

    def __init__(self, paths: Sequence[Path], config: LlamaConfig, kind: str) -> None:
        """Read the headers. Raises CheckpointError for a bad one and for a matrix without its scales."""
        self.kind = kind
        self._files = SafetensorsWeights(paths, has_rounded=True)
        self._matrices = stored_matrices(empty_rounded(config, kind, device="meta", dtype=torch.float32))
        scales = {f"{name}.scale" for name in self._matrices}
        missing = sorted(scales - self._files.names)
        if missing:
            raise CheckpointError(f"{paths[0].parent}: {self.stored_name(missing[0])} is missing")
        self.names = self._files.names - scales

    def stored_name(self, name: str) -> str:
        """How the files call a weight."""
        return self._files.stored_name(name)

    def dtype(self, name: str) -> torch.dtype:
        """How a weight is stored."""
        return self._files.dtype(name)

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError unless a weight stands for one of ``shape``, and is of its type."""
        matrix = self._matrices.get(name.removesuffix(".weight"))
        if matrix is None:
            self._files.check_shape(name, shape)
            self._files.check_dtype(name, FLOATS)
            return
        for part, kept in matrix.named_buffers(prefix=name.removesuffix(".weight")):
            self._files.check_shape(part, tuple(kept.shape))
            self._files.check_dtype(part, (kept.dtype,))

    def copy_into(self, name: str, weight: Tensor, config: LlamaConfig) -> None:
        """Fill a weight with what its file stands for."""
        matrix = self._matrices.get(name.removesuffix(".weight"))
        if matrix is None:
            self._files.copy_into(name, weight, config)
            return
        read = KINDS[self.kind](matrix.inputs, matrix.outputs, device="cpu")
        self.restore(name, read, config)
        weight.copy_(read.dense(torch.float32))

    def restore(self, name: str, matrix: RoundedLinear, config: LlamaConfig) -> None:
        """Fill a matrix of the stored type as it was saved."""
        for part, kept in matrix.named_buffers(prefix=name.removesuffix(".weight")):
            self._files.copy_into(part, kept, config)

"""What training leaves: whole models in Hugging Face's layout, adapters in peft's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..llama.checkpoint import Checkpoint, load_model, save_hugging_face
from ..llama.model import Llama
from ..llama.safetensors_weights import hugging_face_name
from ..llama.tokenizer import Tokenizer
from .plan import AdapterSettings

_SCORE = "score.weight"


def save_whole(trained: Mapping[str, Tensor], checkpoint: Checkpoint, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model that full training left, in the type in which its base is stored."""
    weights = {_model_name(name): weight for name, weight in trained.items()}
    score = weights.pop(_SCORE, None)
    llama = Llama(checkpoint.config, device="meta", dtype=torch.float32)
    if score is not None:
        llama.output = None
    llama.load_state_dict(weights, assign=True)
    _save(llama, score, checkpoint, tokenizer, folder)


def save_merged(
    trained: Mapping[str, Tensor], scale: float, checkpoint: Checkpoint, tokenizer: Tokenizer, folder: Path
) -> None:
    """Write the base with an adapter worked in. It is read again, so that nothing of a rounded base gets in."""
    score = trained.get(f"head.{_SCORE}")
    llama = merged(trained, scale, checkpoint)
    if score is not None:
        llama.output = None
    _save(llama, score, checkpoint, tokenizer, folder)


@torch.no_grad()
def merged(trained: Mapping[str, Tensor], scale: float, checkpoint: Checkpoint) -> Llama:
    """The base with an adapter worked in, on the CPU, in the type in which it is stored."""
    llama = load_model(checkpoint, device="cpu", dtype=checkpoint.dtype)
    for name, up_OR in trained.items():
        matrix, _, part = name.rpartition(".")
        if part != "up":
            continue
        weight = llama.get_submodule(_model_name(matrix)).weight
        assert isinstance(weight, Tensor)
        sum_OI = torch.addmm(weight.float(), up_OR, trained[f"{matrix}.down"], alpha=scale)
        if (magnitude_O := trained.get(f"{matrix}.magnitude")) is not None:
            sum_OI *= (magnitude_O / sum_OI.norm(dim=1))[:, None]
        weight.copy_(sum_OI)
    return llama


def save_adapter(trained: Mapping[str, Tensor], settings: AdapterSettings, base: Path, folder: Path) -> None:
    """Write an adapter as peft does: ``adapter_config.json`` and ``adapter_model.safetensors``."""
    tensors: dict[str, Tensor] = {}
    targets: set[str] = set()
    has_magnitude = False
    for name, weight in trained.items():
        matrix, _, part = name.rpartition(".")
        stored = hugging_face_name(_model_name(matrix))
        targets.add(stored.rpartition(".")[2])
        suffix = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}[part]
        has_magnitude |= part == "magnitude"
        tensors[f"base_model.model.{stored}.{suffix}"] = weight.contiguous()
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": has_magnitude,
        "use_rslora": False,
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save(llama: Llama, score: Tensor | None, checkpoint: Checkpoint, tokenizer: Tokenizer, folder: Path) -> None:
    # A base model's folder may name the end of a text alone; what was learnt ends turns.
    ends = sorted({*checkpoint.eos_ids, *tokenizer.stop_ids})
    dtype = torch.float32 if checkpoint.rounding is not None else checkpoint.dtype
    bos = tokenizer.special("<|begin_of_text|>")
    # A sequence ends with the end of a turn, so that cannot be the padding: its score would be another place's.
    pad = tokenizer.special("<|finetune_right_pad_id|>")
    save_hugging_face(llama, folder, dtype=dtype, bos_id=bos, eos_ids=ends, score=score, pad_id=pad)
    shutil.copyfile(checkpoint.tokenizer, folder / checkpoint.tokenizer.name)


def _model_name(name: str) -> str:
    return name.removeprefix("llama.").removeprefix("head.")

"""Adapters as peft makes them, on small random networks of transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tuned(reference: LlamaForCausalLM, folder: Path, *, seed: int = 0, **settings: Any) -> PeftModel:
    """The network with a random adapter on it, strong enough to change its answers, which is saved in ``folder``."""
    torch.manual_seed(seed)
    asked: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ALL_TARGETS} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads what the newest transformers has renamed
        model = get_peft_model(reference, LoraConfig(**asked))
    assert isinstance(model, PeftModel)
    model.train(False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
    model.save_pretrained(str(folder))
    return model

"""Small models that the tests of this plugin share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llama_stack_meta_reference.llama.checkpoint import save_hugging_face
from llama_stack_meta_reference.llama.config import LlamaConfig, RopeScaling
from llama_stack_meta_reference.llama.model import Llama

SMALL = LlamaConfig(
    dim=64,
    n_layers=2,
    n_heads=8,
    n_kv_heads=2,
    head_dim=8,
    ffn_dim=128,
    vocab_size=256,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32),
    max_context=128,
    tied_embeddings=False,
)


@pytest.fixture(scope="session")
def small_model() -> Llama:
    """A random float32 network of 0.1 million weights, with scaled rope and grouped queries; not to be changed."""
    model = Llama(SMALL, device="cpu", dtype=torch.float32)
    model.initialize(torch.Generator().manual_seed(0), std=0.2)
    return model


@pytest.fixture
def small_checkpoint(small_model: Llama, tmp_path: Path) -> Path:
    """A folder of its own with ``small_model`` in Hugging Face's layout, without a tokenizer."""
    folder = tmp_path / "small"
    save_hugging_face(small_model, folder, eos_ids=[3, 5])
    return folder

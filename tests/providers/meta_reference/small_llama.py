"""The sizes of the small networks that tests share: every feature of the family in 0.1 million weights."""

from __future__ import annotations

from dataclasses import replace

from llama_stack_meta_reference.llama.config import LlamaConfig, RopeScaling

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

WORDED = replace(SMALL, vocab_size=856)
"""With a place for each token of small_tokenizer.py."""

"""Random weights of a Llama's shape in a GGUF file, for llama.cpp. Needs the package `gguf`, no dependency of ours."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from llama_stack_meta_reference.llama.config import LlamaConfig


def write_gguf(config: LlamaConfig, kind: str, path: Path, *, with_vocabulary: bool = False) -> None:
    """Write random weights of ``config``'s shape, matrices as ``kind``, norms in float32.

    ``with_vocabulary`` gives each token a text, as llama-server needs it.
    """
    rng = np.random.default_rng(0)
    quantization = getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if with_vocabulary:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(b"w%d" % token for token in range(3, config.vocab_size))])
        writer.add_token_scores([0.0] * config.vocab_size)
        writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (config.vocab_size - 3))
    else:
        writer.add_tokenizer_model("none")

    def matrix(name: str, outputs: int, inputs: int) -> None:
        weights = rng.standard_normal((outputs, inputs), dtype=np.float32) * 0.02
        writer.add_tensor(name, gguf.quants.quantize(weights, quantization), raw_dtype=quantization)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(config.dim, dtype=np.float32))

    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    matrix("token_embd.weight", config.vocab_size, config.dim)
    for layer in range(config.n_layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm.weight")
        norm(f"{block}.ffn_norm.weight")
        matrix(f"{block}.attn_q.weight", queries, config.dim)
        matrix(f"{block}.attn_k.weight", keys, config.dim)
        matrix(f"{block}.attn_v.weight", keys, config.dim)
        matrix(f"{block}.attn_output.weight", config.dim, queries)
        matrix(f"{block}.ffn_gate.weight", config.ffn_dim, config.dim)
        matrix(f"{block}.ffn_up.weight", config.ffn_dim, config.dim)
        matrix(f"{block}.ffn_down.weight", config.dim, config.ffn_dim)
    norm("output_norm.weight")
    if not config.tied_embeddings:
        matrix("output.weight", config.vocab_size, config.dim)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

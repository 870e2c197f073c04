"""Small random checkpoints for tests: made by transformers, since we should not only read what we wrote ourselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

# Meta's names, and the axis along which Meta's releases split each among ranks; None: every rank has the whole.
_META_NAMES: dict[str, tuple[str, int | None]] = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}

LLAMA_3_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 500000.0}


def scaled_rope(factor: float, original_context: int) -> dict[str, Any]:
    """Llama 3.1's scaling; a short original context makes it matter within a short test."""
    return LLAMA_3_ROPE | {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original_context,
    }


def random_reference(
    *,
    dim: int = 64,
    layers: int = 2,
    heads: int = 8,
    kv_heads: int = 2,
    ffn_dim: int = 128,
    vocabulary: int = 256,
    context: int = 512,
    rope: dict[str, Any] | None = None,
    tied: bool = False,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A random float32 network of transformers, its weights wide enough that attention is far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn_dim,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        rope_parameters=rope or LLAMA_3_ROPE,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=[3, 5],
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    model.train(False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def write_hugging_face(model: LlamaForCausalLM, folder: Path, *, shard_bytes: int | None = None) -> Path:
    """Save as transformers does: one safetensors file, or several of at most ``shard_bytes`` with an index."""
    if shard_bytes is None:
        model.save_pretrained(folder)
    else:
        model.save_pretrained(folder, max_shard_size=shard_bytes)
    return folder


def write_meta(
    model: LlamaForCausalLM, folder: Path, *, shards: int = 1, split_vocabulary: bool = True, multiple_of: int = 32
) -> Path:
    """Save as Meta does: ``params.json`` and one ``consolidated.NN.pth`` a rank, heads in Meta's rotary order."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for name, weight in model.state_dict().items():
        meta_name, axis = _meta_name(name, split_vocabulary)
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if meta_name.endswith(("wq.weight", "wk.weight")):
            weight = _to_neighbours(weight, model.config.hidden_size // model.config.num_attention_heads)
        pieces = [weight] * shards if axis is None else weight.chunk(shards, axis)
        for part, piece in zip(parts, pieces, strict=True):
            part[meta_name] = piece.clone()
    for rank, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    (folder / "params.json").write_text(json.dumps(_params(model.config, multiple_of)))
    return folder


def _meta_name(name: str, split_vocabulary: bool) -> tuple[str, int | None]:
    if name == "model.embed_tokens.weight":
        return "tok_embeddings.weight", 0 if split_vocabulary else 1
    if name == "lm_head.weight":
        return "output.weight", 0
    if name == "model.norm.weight":
        return "norm.weight", None
    _, _, layer, rest = name.split(".", 3)
    meta_name, axis = _META_NAMES[rest.removesuffix(".weight")]
    return f"layers.{layer}.{meta_name}.weight", axis


def _to_neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """Row i of a head's first half and row i of its second half become rows 2i and 2i + 1."""
    heads = weight.view(-1, head_dim, weight.shape[1])
    first, second = heads[:, : head_dim // 2], heads[:, head_dim // 2 :]
    return torch.stack((first, second), dim=2).reshape(weight.shape)


def _params(config: Any, multiple_of: int) -> dict[str, Any]:
    rope = config.rope_parameters
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple_of,
        # The reference computes int(multiplier * int(8/3 dim)) and rounds it up to multiple_of.
        "ffn_dim_multiplier": (config.intermediate_size - multiple_of / 2) / int(8 * config.hidden_size / 3),
        "norm_eps": config.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "max_seq_len": config.max_position_embeddings,
    }
    if rope["rope_type"] == "llama3":
        params |= {
            "use_scaled_rope": True,
            "rope_scaling_factor": rope["factor"],
            "rope_original_context": rope["original_max_position_embeddings"],
        }
    return params

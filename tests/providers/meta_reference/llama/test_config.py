from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from llama_stack_meta_reference.llama.config import LlamaConfig, RopeScaling
from transformers import LlamaConfig as TransformersConfig

from llama_stack.errors import CheckpointError
from tests.providers.meta_reference.small_llama import SMALL

LLAMA_3_1 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)

# params.json as published; the fields that all have in common are in META_COMMON.
META_COMMON: dict[str, Any] = {"vocab_size": 128256, "norm_eps": 1e-05, "rope_theta": 500000.0}
META_3_8B = META_COMMON | {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3,
}
META_3_3_70B = META_COMMON | {
    "dim": 8192,
    "n_layers": 80,
    "n_heads": 64,
    "n_kv_heads": 8,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.3,
    "use_scaled_rope": True,
}
META_3_2_1B = META_COMMON | {
    "dim": 2048,
    "n_layers": 16,
    "n_heads": 32,
    "n_kv_heads": 8,
    "multiple_of": 256,
    "ffn_dim_multiplier": 1.5,
    "use_scaled_rope": True,
}
HUGGING_FACE: dict[str, Any] = SMALL.to_hugging_face()


@pytest.mark.parametrize(
    ("params", "ffn_dim", "factor", "max_context", "parameters"),
    [
        (META_3_8B, 14336, None, 8192, 8_030_261_248),
        (META_3_8B | {"use_scaled_rope": True}, 14336, 8.0, 131072, 8_030_261_248),
        (META_3_2_1B, 8192, 32.0, 131072, 1_235_814_400),
        (META_3_3_70B, 28672, 8.0, 131072, 70_553_706_496),
    ],
    ids=["3-8b", "3.1-8b", "3.2-1b", "3.3-70b"],
)
def test_published_params_give_the_published_sizes(
    params: dict[str, Any], ffn_dim: int, factor: float | None, max_context: int, parameters: int
) -> None:
    """Meta's file states neither the feed-forward width nor the context, and 3.1 and 3.2 differ only by their sizes."""
    config = LlamaConfig.from_meta(params, tied_embeddings=params is META_3_2_1B)
    assert config.ffn_dim == ffn_dim
    assert config.rope_scaling == (None if factor is None else replace(LLAMA_3_1, factor=factor))
    assert config.max_context == max_context
    assert config.parameter_count == parameters


def test_hugging_face_config_survives_the_round_trip() -> None:
    """What training writes is what inference reads."""
    for config in (SMALL, replace(SMALL, rope_scaling=None), replace(SMALL, head_dim=16, tied_embeddings=True)):
        assert LlamaConfig.from_hugging_face(config.to_hugging_face()) == config


def test_transformers_reads_our_config_as_we_do() -> None:
    """A model that is trained here can be served elsewhere; transformers' own form reads back too."""
    theirs = TransformersConfig.from_dict(SMALL.to_hugging_face())
    assert theirs.to_dict()["rope_parameters"]["factor"] == 8.0
    assert LlamaConfig.from_hugging_face(theirs.to_dict() | {"architectures": ["LlamaForCausalLM"]}) == SMALL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": None}, r"params\.json: dim is missing; found: ffn_dim_multiplier, multiple_of, n_heads"),
        ({"n_layers": "32"}, r"n_layers must be a whole number; found '32'"),
        ({"n_layers": True}, r"n_layers must be a whole number; found True"),
        ({"n_heads": 33}, r"n_heads must divide dim; found dim 4096, n_heads 33"),
        ({"n_heads": 0}, r"n_heads must divide dim"),
        ({"n_kv_heads": 5}, r"n_kv_heads must divide n_heads"),
        ({"n_kv_heads": 0}, r"n_kv_heads must be from 1 to"),
        ({"vocab_size": -1}, r"vocab_size must be from 1 to"),
        ({"n_layers": 10**9}, r"n_layers must be from 1 to 1024; found 1000000000"),
        ({"multiple_of": 0}, r"multiple_of and ffn_dim_multiplier must be positive"),
        ({"norm_eps": 0}, r"norm_eps must be a positive number"),
        ({"rope_theta": float("nan")}, r"rope_theta must be a number up to"),
        ({"rope_theta": 10**400}, r"rope_theta must be a number up to"),
        ({"use_scaled_rope": 1}, r"use_scaled_rope must be true or false; found 1"),
        ({"use_scaled_rope": True, "rope_high_freq_factor": 1.0}, r"0 < low_freq_factor < high_freq_factor"),
        ({"vision_chunk_size": 448}, r"unsupported: vision_chunk_size; only Llama 3 text models"),
        ({"moe_args": {"num_experts": 16}}, r"unsupported: moe_args"),
        ({"quantization_args": {"scheme": "int4"}}, r"unsupported: quantization_args"),
    ],
)
def test_wrong_meta_params_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    """A field that is ignored gives wrong answers; one that is named gives an operator the next step."""
    with pytest.raises(CheckpointError, match=message):
        LlamaConfig.from_meta(META_3_8B | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, r"config\.json: model_type must be 'llama'; found 'mixtral'"),
        ({"model_type": None}, r"model_type must be 'llama'; found None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures must be \['LlamaForCausalLM'\]"),
        ({"attention_bias": True}, r"unsupported attention_bias: True; this network has False"),
        ({"mlp_bias": True}, r"unsupported mlp_bias: True"),
        ({"hidden_act": "gelu"}, r"unsupported hidden_act: 'gelu'; this network has 'silu'"),
        ({"num_local_experts": 8}, r"unsupported num_local_experts: 8"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"unsupported quantization_config"),
        ({"hidden_size": None}, r"hidden_size is missing; found: .*vocab_size"),
        ({"hidden_size": 65, "head_dim": None}, r"num_attention_heads must divide hidden_size"),
        ({"head_dim": 7}, r"head_dim must be even"),
        ({"max_position_embeddings": 0}, r"max_context must be from 1 to"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings must be true or false; found 'yes'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"unsupported rope_scaling\.rope_type: 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"config\.json: rope_scaling: factor is missing; found: rope_type"),
        ({"rope_scaling": "llama3"}, r"rope_scaling must be an object; found 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"unsupported rope_parameters\.rope_type: 'yarn'"),
    ],
)
def test_wrong_hugging_face_configs_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    """Other models share the file's form: a network that only looks like a Llama must not be run as one."""
    with pytest.raises(CheckpointError, match=message):
        LlamaConfig.from_hugging_face(HUGGING_FACE | change)

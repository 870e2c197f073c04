"""The sizes of a Llama network, read from Meta's ``params.json`` or from Hugging Face's ``config.json``.

Only the Llama 3 text family is accepted (3, 3.1, 3.2, 3.3). A field that would change the network in a way that
model.py does not know is refused by its name: a silently ignored field gives wrong answers, not an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llama_stack.errors import CheckpointError

# Context lengths as published in the model cards; params.json does not state them.
_LLAMA_3_CONTEXT = 8192
_LLAMA_3_1_CONTEXT = 131072

# Llama 3.2 text models share params.json's ``use_scaled_rope: true`` with 3.1, yet stretch by 32 where 3.1 stretches by
# 8, as the config.json published beside it states. Only their sizes (dim, n_layers) tell them apart: no other release
# has these.
_LLAMA_3_2_SIZES = frozenset({(2048, 16), (3072, 28)})

# No published size comes near these; they stop a hostile file from asking for a network of 10^9 layers.
_LARGEST_LAYER_COUNT = 1024
_LARGEST_SIZE = 1 << 22
_LARGEST_NUMBER = 1e12

_META_KEYS = frozenset(
    {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"}
    | {"rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor"}
    | {"rope_original_context", "max_seq_len", "max_batch_size"}
)
# Field of config.json -> the only value with which the network is a plain Llama.
_HUGGING_FACE_FIXED: Mapping[str, object] = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "num_local_experts": None,
    "sliding_window": None,
    "is_encoder_decoder": False,
}


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later stretch rotary angles beyond the context that the model was first trained on."""

    factor: float
    """How many times the slow rotations are slowed further."""
    low_freq_factor: float
    """A rotation with fewer turns than this in the original context is slowed by the whole factor."""
    high_freq_factor: float
    """A rotation with more turns than this in the original context stays as it is; between the two, a blend."""
    original_context: int
    """Tokens in the context of the first training."""

    def __post_init__(self) -> None:
        if self.factor < 1 or self.low_freq_factor <= 0 or self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                "rope scaling needs factor >= 1 and 0 < low_freq_factor < high_freq_factor; "
                f"found factor {self.factor}, low_freq_factor {self.low_freq_factor}, "
                f"high_freq_factor {self.high_freq_factor}"
            )


@dataclass(frozen=True)
class LlamaConfig:
    """What decides the shape of a Llama network and its rotary angles. Sizes count elements, contexts tokens."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_context: int
    tied_embeddings: bool
    """Whether the output projection is the embedding table, as in Llama 3.2's text models."""

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_context"):
            size = getattr(self, name)
            largest = _LARGEST_LAYER_COUNT if name == "n_layers" else _LARGEST_SIZE
            if not 1 <= size <= largest:
                raise CheckpointError(f"{name} must be from 1 to {largest}; found {size}")
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                f"n_kv_heads must divide n_heads; found n_heads {self.n_heads}, n_kv_heads {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim must be even, since rotary angles turn pairs; found {self.head_dim}")
        for name in ("norm_eps", "rope_theta"):
            number = getattr(self, name)
            if not (math.isfinite(number) and number > 0):
                raise CheckpointError(f"{name} must be a positive number; found {number}")

    @property
    def parameter_count(self) -> int:
        """How many weights the network has, counting tied embeddings once."""
        attention = self.dim * self.head_dim * 2 * (self.n_heads + self.n_kv_heads)
        layer = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tied_embeddings else 2)
        return embeddings + self.n_layers * layer + self.dim

    def shard(self, ranks: int) -> LlamaConfig:
        """The sizes of one rank's part of the network (parallel.py); each of them must come out even."""
        return replace(
            self,
            n_heads=self.n_heads // ranks,
            n_kv_heads=self.n_kv_heads // ranks,
            ffn_dim=self.ffn_dim // ranks,
            vocab_size=self.vocab_size // ranks,
        )

    @classmethod
    def from_meta(cls, params: Mapping[str, Any], *, tied_embeddings: bool = False) -> LlamaConfig:
        """Read Meta's ``params.json``; whether embeddings are tied is known only from the weights (no
        ``output.weight``).

        The width of the feed-forward layer follows Meta's reference: two thirds of 4 x dim, times
        ``ffn_dim_multiplier``, rounded up to a multiple of ``multiple_of``. Scaled rope follows the published models:
        factor 8 in 3.1 and 3.3, factor 32 in 3.2's text models; the optional ``rope_scaling_factor``,
        ``rope_low_freq_factor``, ``rope_high_freq_factor`` and ``rope_original_context`` override it.

        Raises CheckpointError for a missing, wrongly typed or unsupported field.
        """
        unknown = sorted(key for key, value in params.items() if key not in _META_KEYS and value not in (None, False))
        if unknown:
            raise CheckpointError(
                f"params.json: unsupported: {', '.join(unknown)}; only Llama 3 text models can be loaded"
            )
        fields = _Fields("params.json", params)
        dim, n_layers, n_heads = fields.integer("dim"), fields.integer("n_layers"), fields.integer("n_heads")
        if n_heads < 1 or dim % n_heads:
            raise CheckpointError(f"params.json: n_heads must divide dim; found dim {dim}, n_heads {n_heads}")
        rope_scaling = None
        if fields.boolean("use_scaled_rope", False):
            published_factor = 32.0 if (dim, n_layers) in _LLAMA_3_2_SIZES else 8.0
            rope_scaling = RopeScaling(
                factor=fields.number("rope_scaling_factor", published_factor),
                low_freq_factor=fields.number("rope_low_freq_factor", 1.0),
                high_freq_factor=fields.number("rope_high_freq_factor", 4.0),
                original_context=fields.integer("rope_original_context", _LLAMA_3_CONTEXT),
            )
        return cls(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=fields.integer("n_kv_heads", n_heads),
            head_dim=dim // n_heads,
            ffn_dim=_meta_ffn_dim(dim, fields.integer("multiple_of", 256), fields.number("ffn_dim_multiplier", 1.0)),
            vocab_size=fields.integer("vocab_size"),
            norm_eps=fields.number("norm_eps", 1e-5),
            rope_theta=fields.number("rope_theta", 500000.0),
            rope_scaling=rope_scaling,
            max_context=fields.integer("max_seq_len", _LLAMA_3_CONTEXT if rope_scaling is None else _LLAMA_3_1_CONTEXT),
            tied_embeddings=tied_embeddings,
        )

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read Hugging Face's ``config.json``, with rope given as ``rope_parameters`` or as ``rope_theta`` and
        ``rope_scaling``.

        Raises CheckpointError for a missing, wrongly typed or unsupported field, and for every model type but
        ``llama``.
        """
        fields = _Fields("config.json", config)
        if config.get("model_type") != "llama":
            raise CheckpointError(f"config.json: model_type must be 'llama'; found {config.get('model_type')!r}")
        architectures = config.get("architectures") or ["LlamaForCausalLM"]
        if architectures != ["LlamaForCausalLM"]:
            raise CheckpointError(f"config.json: architectures must be ['LlamaForCausalLM']; found {architectures!r}")
        for name, plain in _HUGGING_FACE_FIXED.items():
            if config.get(name) is not None and config[name] != plain:
                raise CheckpointError(
                    f"config.json: unsupported {name}: {_shown(config[name])}; this network has {plain!r}"
                )
        dim, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        if config.get("head_dim") is None and (n_heads < 1 or dim % n_heads):
            raise CheckpointError(
                f"config.json: num_attention_heads must divide hidden_size where head_dim is not given; "
                f"found {dim} and {n_heads}"
            )
        max_context = fields.integer("max_position_embeddings")
        rope_theta, rope_scaling = _hugging_face_rope(fields, max_context)
        return cls(
            dim=dim,
            n_layers=fields.integer("num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=fields.integer("num_key_value_heads", n_heads),
            head_dim=fields.integer("head_dim", dim // n_heads),
            ffn_dim=fields.integer("intermediate_size"),
            vocab_size=fields.integer("vocab_size"),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_context=max_context,
            tied_embeddings=fields.boolean("tie_word_embeddings", False),
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """Give the content of a ``config.json`` that ``from_hugging_face`` reads back to the same sizes."""
        rope_scaling = None
        if self.rope_scaling is not None:
            rope_scaling = {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_freq_factor,
                "high_freq_factor": self.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": self.rope_scaling.original_context,
            }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.dim,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn_dim,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope_scaling,
            "max_position_embeddings": self.max_context,
            "tie_word_embeddings": self.tied_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }


class _Fields:
    """Typed look-ups in one JSON object; every fault names the file and the field."""

    def __init__(self, file: str, values: Mapping[str, Any]) -> None:
        self.file = file
        self.values = values

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{self.file}: {name} must be a whole number; found {_shown(value)}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        # The bound comes first: a whole number of 400 digits has no float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST_NUMBER:
            raise CheckpointError(
                f"{self.file}: {name} must be a number up to {_LARGEST_NUMBER:g}; found {_shown(value)}"
            )
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.file}: {name} must be true or false; found {_shown(value)}")
        return value

    def _value(self, name: str, default: object) -> object:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            given = sorted(key for key, found in self.values.items() if found is not None)
            raise CheckpointError(f"{self.file}: {name} is missing; found: {', '.join(given)[:300] or 'no fields'}")
        return value


def _meta_ffn_dim(dim: int, multiple_of: int, multiplier: float) -> int:
    if not 1 <= multiple_of <= _LARGEST_SIZE or not 0 < multiplier <= _LARGEST_SIZE:
        raise CheckpointError(
            f"params.json: multiple_of and ffn_dim_multiplier must be positive; found {multiple_of} and {multiplier}"
        )
    width = int(multiplier * int(2 * (4 * dim) / 3))
    return multiple_of * math.ceil(width / multiple_of)


def _hugging_face_rope(fields: _Fields, max_context: int) -> tuple[float, RopeScaling | None]:
    """Read rope_theta and the scaling from whichever of the two forms the file has."""
    name = "rope_parameters" if fields.values.get("rope_parameters") is not None else "rope_scaling"
    rope = fields.values.get(name)
    if rope is None:
        return fields.number("rope_theta", 10000.0), None
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"config.json: {name} must be an object; found {_shown(rope)}")
    rope_fields = _Fields(f"config.json: {name}", rope)
    theta = rope_fields.number("rope_theta", fields.number("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(
            f"config.json: unsupported {name}.rope_type: {_shown(kind)}; supported: 'default', 'llama3'"
        )
    return theta, RopeScaling(
        factor=rope_fields.number("factor"),
        low_freq_factor=rope_fields.number("low_freq_factor"),
        high_freq_factor=rope_fields.number("high_freq_factor"),
        original_context=rope_fields.integer("original_max_position_embeddings", max_context),
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

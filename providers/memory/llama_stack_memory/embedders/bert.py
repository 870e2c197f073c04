"""Sentence embeddings by BERT (arXiv:1810.04805), from a folder in Hugging Face's layout, in numpy.

The texts of a batch lie behind each other in one matrix, without padding: T tokens of all of them, D wide. Only
attention looks at one text at a time, with H heads of width K. A text's vector is the mean of its tokens' (or the first
one's, where the folder says so), scaled to length 1, as sentence-transformers makes it (arXiv:1908.10084).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from llama_stack.errors import CheckpointError

from ..interfaces import Span, Vectors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPECIAL_TOKENS = 2
"""[CLS] before a text and [SEP] behind it."""


@dataclass(frozen=True, slots=True)
class BertSizes:
    """What is needed of ``config.json`` and of the files that sentence-transformers puts beside it."""

    layers: int
    heads: int
    norm_epsilon: float
    positions: int
    """The most tokens of a text, the special ones included."""
    has_mean: bool
    """Whether the tokens' mean stands for a text, or else its first token."""

    @staticmethod
    def read(folder: Path) -> BertSizes:
        """Read the files of a folder. Raises ``CheckpointError`` for another network than this module runs."""
        config = _json(folder / "config.json")
        pooling = _json(folder / "1_Pooling" / "config.json", missing={})
        limits = _json(folder / "sentence_bert_config.json", missing={})
        for key, needed in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if config.get(key, needed) != needed:
                raise CheckpointError(f"{folder}/config.json: {key} is {config[key]!r}; only {needed!r} is run here")
        has_mean = bool(pooling.get("pooling_mode_mean_tokens", True))
        if not has_mean and not pooling.get("pooling_mode_cls_token"):
            raise CheckpointError(f"{folder}/1_Pooling/config.json: only the mean and the first token are run here")
        positions = _whole(config, "max_position_embeddings", folder)
        return BertSizes(
            layers=_whole(config, "num_hidden_layers", folder),
            heads=_whole(config, "num_attention_heads", folder),
            norm_epsilon=float(config.get("layer_norm_eps", 1e-12)),
            positions=min(positions, _whole({"max_seq_length": positions} | limits, "max_seq_length", folder)),
            has_mean=has_mean,
        )


class Bert:
    """The network. ``weights`` are Hugging Face's, by name."""

    def __init__(self, sizes: BertSizes, weights: Mapping[str, Vectors]) -> None:
        self.sizes = sizes
        self._word_VD = weights["embeddings.word_embeddings.weight"]
        # Every token is of the first of the two kinds, so its embedding can be added to the positions'.
        kinds_2D = weights["embeddings.token_type_embeddings.weight"]
        self._position_PD = weights["embeddings.position_embeddings.weight"] + kinds_2D[0]
        self._norm = _norm_of(weights, "embeddings.LayerNorm")
        self._layers = [_Layer(weights, f"encoder.layer.{n}.", sizes) for n in range(sizes.layers)]

    @property
    def dimensions(self) -> int:
        return int(self._word_VD.shape[1])

    def embed(self, texts: Sequence[Sequence[int]]) -> Vectors:
        """The vectors (texts, D) of tokenized texts, none of them empty."""
        ends = np.cumsum([len(tokens) for tokens in texts]).tolist()
        spans = list(zip([0, *ends], ends, strict=False))
        x_TD = self._word_VD[np.concatenate([np.asarray(tokens) for tokens in texts])]
        x_TD += np.concatenate([self._position_PD[: end - start] for start, end in spans])
        x_TD = _normed(x_TD, self._norm, self.sizes.norm_epsilon)
        for layer in self._layers:
            x_TD = layer(x_TD, spans)
        pooled = [x_TD[start:end].mean(axis=0) if self.sizes.has_mean else x_TD[start] for start, end in spans]
        vectors_BD = np.stack(pooled)
        vectors_BD /= np.linalg.norm(vectors_BD, axis=1, keepdims=True)
        return vectors_BD


class _Layer:
    """Attention, then two linear layers, each with what went in added and the sum normalized."""

    def __init__(self, weights: Mapping[str, Vectors], prefix: str, sizes: BertSizes) -> None:
        parts = [_linear_of(weights, f"{prefix}attention.self.{name}") for name in ("query", "key", "value")]
        self._qkv = np.concatenate([w for w, _ in parts], axis=1), np.concatenate([b for _, b in parts])
        self._joined = _linear_of(weights, f"{prefix}attention.output.dense")
        self._attention_norm = _norm_of(weights, f"{prefix}attention.output.LayerNorm")
        self._wide = _linear_of(weights, f"{prefix}intermediate.dense")
        self._narrow = _linear_of(weights, f"{prefix}output.dense")
        self._norm = _norm_of(weights, f"{prefix}output.LayerNorm")
        self._heads, self._epsilon = sizes.heads, sizes.norm_epsilon

    def __call__(self, x_TD: Vectors, spans: Sequence[Span]) -> Vectors:
        qkv = _linear(x_TD, self._qkv)
        attended_TD = np.concatenate([_attend(qkv[start:end], self._heads) for start, end in spans])
        x_TD = _normed(x_TD + _linear(attended_TD, self._joined), self._attention_norm, self._epsilon)
        wide = _gelu(_linear(x_TD, self._wide))
        return _normed(x_TD + _linear(wide, self._narrow), self._norm, self._epsilon)


class BertEmbedder:
    """See ``Embedder``. Raises ``CheckpointError`` for a folder that holds no such model."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """Without a ``name`` it is the folder's, with a hash of the weights: banks of other weights are other banks."""
        weights_file = folder / "model.safetensors"
        sizes = BertSizes.read(folder)
        self._tokenizer = _tokenizer(folder / "tokenizer.json")
        self._bert = Bert(sizes, _weights(weights_file))
        self.name = name or f"{folder.resolve().name}-{file_digest(weights_file)[:8]}"
        self.dimensions = self._bert.dimensions
        self.max_tokens = sizes.positions - _SPECIAL_TOKENS
        self._begin, self._end = self._tokenizer.encode("").ids
        # For this process, where nothing else multiplies matrices for long: BLAS's own threads wait for each other in
        # a spin, and on cores that are busy with something else that costs many times what it gains.
        threadpool_limits(1, "blas")
        try:
            self.embed([""])
        except (ValueError, IndexError) as error:
            raise CheckpointError(
                f"{weights_file}: its tensors are not of the sizes in config.json: {error}"
            ) from error

    def embed(self, texts: Sequence[str]) -> Vectors:
        """See ``Embedder.embed``."""
        if not texts:
            return np.empty((0, self.dimensions), np.float32)
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return self._bert.embed([[self._begin, *e.ids[: self.max_tokens], self._end] for e in encoded])

    def token_spans(self, text: str) -> list[Span]:
        """The word pieces of the model's vocabulary."""
        spans: list[Span] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return spans


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Linear = tuple[Vectors, Vectors]
"""Weights (inputs, outputs) and bias."""


def _linear(x_TD: Vectors, linear: Linear) -> Vectors:
    weights, bias = linear
    y: Vectors = x_TD @ weights
    y += bias
    return y


def _attend(qkv: Vectors, heads: int) -> Vectors:
    """Attention of the tokens of one text to all of them; (S, 3 D) to (S, D)."""
    length, width = qkv.shape
    q_HSK, k_HSK, v_HSK = qkv.reshape(length, 3, heads, width // 3 // heads).transpose(1, 2, 0, 3)
    scores_HSS: NDArray[Any] = q_HSK @ k_HSK.transpose(0, 2, 1)
    scores_HSS /= np.float32(q_HSK.shape[2] ** 0.5)
    scores_HSS -= scores_HSS.max(axis=2, keepdims=True)
    np.exp(scores_HSS, out=scores_HSS)
    scores_HSS /= scores_HSS.sum(axis=2, keepdims=True)
    attended: Vectors = (scores_HSS @ v_HSK).transpose(1, 0, 2).reshape(length, width // 3)
    return attended


def _normed(x_TD: Vectors, norm: Linear, epsilon: float) -> Vectors:
    weights, bias = norm
    centred: NDArray[Any] = x_TD - x_TD.mean(axis=1, keepdims=True)
    deviation: NDArray[Any] = np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + np.float32(epsilon))
    centred /= deviation
    centred *= weights
    centred += bias
    return centred


def _gelu(x: Vectors) -> Vectors:
    """x times the normal distribution at x (arXiv:1606.08415), by formula 7.1.26 of Abramowitz and Stegun.

    The formula's erf is off by 1.5e-7 at most.
    """
    z = np.abs(x) * np.float32(0.5**0.5)
    t: NDArray[Any] = 1 / (1 + np.float32(0.3275911) * z)
    series: NDArray[Any] = np.zeros_like(t)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series += np.float32(factor)
        series *= t
    erf = np.copysign(1 - series * np.exp(-z * z), x)
    result: Vectors = x * np.float32(0.5) * (1 + erf)
    return result


def _linear_of(weights: Mapping[str, Vectors], name: str) -> Linear:
    return np.ascontiguousarray(weights[f"{name}.weight"].T), weights[f"{name}.bias"]


def _norm_of(weights: Mapping[str, Vectors], name: str) -> Linear:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _weights(path: Path) -> Mapping[str, Vectors]:
    """The tensors of a file in float32; what heads of other uses add to the names is left out."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return _Weights(path, dict(_named(file)))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _named(file: Any) -> Iterator[tuple[str, Vectors]]:
    for name in file.keys():  # noqa: SIM118 - not a mapping
        tensor: NDArray[Any] = file.get_tensor(name)
        yield name.removeprefix("bert."), tensor.astype(np.float32)


class _Weights(dict[str, Vectors]):
    """Tensors by name, that say which one is missing."""

    def __init__(self, path: Path, tensors: dict[str, Vectors]) -> None:
        super().__init__(tensors)
        self._path = path

    def __missing__(self, name: str) -> Vectors:
        raise CheckpointError(f"{self._path} holds no tensor {name!r}: it is no BERT of the size that config.json says")


def _tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    # The file may say to cut and to pad, at lengths that are not the model's.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if len(tokenizer.encode("").ids) != _SPECIAL_TOKENS:
        raise CheckpointError(f"{path} does not put one token before a text and one behind it, as BERT's does")
    return tokenizer


def _whole(config: Mapping[str, Any], key: str, folder: Path) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{folder}/config.json: {key} is {value!r}, and a whole number from 1 belongs there")
    return value


def _json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        if missing is None:
            raise CheckpointError(f"{path} is missing; a folder in Hugging Face's layout is needed") from None
        return missing
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return found

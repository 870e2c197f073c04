"""DeBERTa-v2 and mDeBERTa for sequence classification, in numpy (He et al. 2021, arXiv:2006.03654 and 2111.09543).

Reads a folder in Hugging Face's layout (``config.json``, ``model.safetensors``). Attention is disentangled: beside
content with content, it weighs content with relative position and relative position with content, where distant
positions share buckets. Inference alone, one sequence at a time, float32: a guard reads a few hundred tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_stack.errors import CheckpointError

Array = NDArray[np.float32]
Positions = NDArray[np.int64]

# T tokens, D model width, H heads, K head width, R relative positions


@dataclass(frozen=True)
class DebertaConfig:
    """The sizes of a network."""

    layers: int
    heads: int
    max_tokens: int
    buckets: int
    """Relative positions in each direction that have an embedding of their own or share one."""
    epsilon: float
    labels: tuple[str, ...]

    @staticmethod
    def read(folder: Path) -> DebertaConfig:
        """Raises ``CheckpointError`` for a folder that holds no such network, or a variant that is not known here."""
        try:
            raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} holds no readable config.json") from error
        kinds = raw.get("pos_att_type", ())
        wanted: dict[str, tuple[Any, ...]] = {
            "model_type": ("deberta-v2",),
            "relative_attention": (True,),
            "share_att_key": (True,),
            "norm_rel_ebd": ("layer_norm",),
            "hidden_act": ("gelu",),
            "pooler_hidden_act": ("gelu",),
            "conv_kernel_size": (0, None),
            "type_vocab_size": (0,),
            "position_biased_input": (False,),
        }
        odd = [f"{key} {raw.get(key)!r}" for key, values in wanted.items() if raw.get(key) not in values]
        if sorted(kinds.split("|") if isinstance(kinds, str) else kinds) != ["c2p", "p2c"]:
            odd.append(f"pos_att_type {kinds!r}")
        if odd:
            raise CheckpointError(
                f"{folder} is no DeBERTa-v2 classifier of the kind that is read here: {', '.join(odd)}"
            )
        try:
            names = {int(number): str(name) for number, name in raw["id2label"].items()}
            return DebertaConfig(
                layers=int(raw["num_hidden_layers"]),
                heads=int(raw["num_attention_heads"]),
                max_tokens=int(raw["max_position_embeddings"]),
                buckets=int(raw["position_buckets"]),
                epsilon=float(raw["layer_norm_eps"]),
                labels=tuple(names[number] for number in range(len(names))),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder}/config.json lacks {error}") from error


class Deberta:
    """A network and its weights."""

    def __init__(self, config: DebertaConfig, weights: Mapping[str, Array]) -> None:
        self.config = config
        self._weights = weights

    @staticmethod
    def load(folder: Path) -> Deberta:
        """Read a folder. Raises ``CheckpointError`` for one that is not whole."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        config = DebertaConfig.read(folder)
        try:
            weights = {name: each.astype(np.float32) for name, each in load_file(folder / "model.safetensors").items()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder} holds no readable model.safetensors") from error
        network = Deberta(config, weights)
        try:
            logits = network.logits([0])
        except (KeyError, ValueError, IndexError) as error:
            raise CheckpointError(f"the weights in {folder} do not fit its config.json: {error}") from error
        if logits.shape != (len(config.labels),) or not np.isfinite(logits).all():
            raise CheckpointError(f"the weights in {folder} do not fit its config.json: {logits.shape[0]} labels")
        return network

    def probabilities(self, ids: list[int]) -> Array:
        """The probability of each label for one sequence of token ids, at most ``max_tokens`` of them."""
        logits = self.logits(ids)
        exponents: Array = np.exp(logits - logits.max())
        total: np.float32 = exponents.sum()
        return exponents / total

    def logits(self, ids: list[int]) -> Array:
        """The value of each label before the softmax."""
        x_TD = self._norm(
            "deberta.embeddings.LayerNorm", self._weights["deberta.embeddings.word_embeddings.weight"][ids]
        )
        relative_RD = self._norm("deberta.encoder.LayerNorm", self._weights["deberta.encoder.rel_embeddings.weight"])
        position_TT = bucketed(len(ids), self.config.buckets, self.config.max_tokens)
        for number in range(self.config.layers):
            layer = f"deberta.encoder.layer.{number}"
            attended_TD = self._attend(f"{layer}.attention.self", x_TD, relative_RD, position_TT)
            x_TD = self._add(f"{layer}.attention.output", x_TD, attended_TD)
            x_TD = self._add(f"{layer}.output", x_TD, gelu(self._linear(f"{layer}.intermediate.dense", x_TD)))
        return self._linear("classifier", gelu(self._linear("pooler.dense", x_TD[0])))

    def _attend(self, name: str, x_TD: Array, relative_RD: Array, position_TT: Positions) -> Array:
        query, key, value = f"{name}.query_proj", f"{name}.key_proj", f"{name}.value_proj"
        q_HTK, k_HTK, v_HTK = (self._heads(self._linear(each, x_TD)) for each in (query, key, value))
        span = self.config.buckets
        relative_RD = relative_RD[: 2 * span]
        relative_q_HRK = self._heads(self._linear(query, relative_RD))
        relative_k_HRK = self._heads(self._linear(key, relative_RD))
        last = 2 * span - 1
        to_position_TT = np.clip(position_TT + span, 0, last)
        from_position_TT = np.clip(-position_TT + span, 0, last)
        scores_HTT = q_HTK @ k_HTK.transpose(0, 2, 1)
        scores_HTT += _gather(q_HTK @ relative_k_HRK.transpose(0, 2, 1), to_position_TT)
        scores_HTT += _gather(k_HTK @ relative_q_HRK.transpose(0, 2, 1), from_position_TT).transpose(0, 2, 1)
        scores_HTT /= np.sqrt(np.float32(3 * q_HTK.shape[2]))  # three kinds of score are added up
        weights_HTT = np.exp(scores_HTT - scores_HTT.max(axis=-1, keepdims=True))
        weights_HTT /= weights_HTT.sum(axis=-1, keepdims=True)
        merged_TD: Array = (weights_HTT @ v_HTK).transpose(1, 0, 2).reshape(x_TD.shape)
        return merged_TD

    def _heads(self, x_TD: Array) -> Array:
        return x_TD.reshape(x_TD.shape[0], self.config.heads, -1).transpose(1, 0, 2)

    def _add(self, name: str, x_TD: Array, inner: Array) -> Array:
        return self._norm(f"{name}.LayerNorm", x_TD + self._linear(f"{name}.dense", inner))

    def _linear(self, name: str, x: Array) -> Array:
        product: Array = x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]
        return product

    def _norm(self, name: str, x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        scaled: Array = centred / np.sqrt(variance + np.float32(self.config.epsilon))
        return scaled * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]


def bucketed(tokens: int, buckets: int, max_position: int) -> Positions:
    """The bucket of each query's distance to each key, (T, T): exact when near, logarithmic when far."""
    distance_TT = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    middle = buckets // 2
    is_near = np.abs(distance_TT) <= middle
    far = np.where(is_near, middle, np.abs(distance_TT)) / middle
    scaled = np.ceil(np.log(far) / np.log((max_position - 1) / middle) * (middle - 1)) + middle
    return np.where(is_near, distance_TT, scaled * np.sign(distance_TT)).astype(np.int64)


def gelu(x: Array) -> Array:
    """x times the normal distribution up to x; the error function to 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26)."""
    z = np.abs(x) / np.float32(np.sqrt(2))
    t = 1 / (1 + 0.3275911 * z)
    powers = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.sign(x) * (1 - powers * np.exp(-z * z))
    return (0.5 * x * (1 + erf)).astype(np.float32)


def _gather(scores_HTR: Array, position_TT: Positions) -> Array:
    """For each token and each other one, the score of the relative position between them: (H, T, T)."""
    index_HTT = np.broadcast_to(position_TT, (scores_HTR.shape[0], *position_TT.shape))
    return np.take_along_axis(scores_HTR, index_HTT, axis=2)

"""Where the tiny model's training starts: a random network in which two layers can already copy.

Left to itself, a small network spends a large part of its training before it finds induction: looking up where a
token stood earlier, and writing what came after it (Olsson et al. 2022, arXiv:2209.11895). All that the tiny model
does rests on this, so it is given the circuit as a start, in the weights of a plain Llama (compare mimetic
initialisation, Trockman & Kolter 2023, arXiv:2305.09828); training then changes these weights as it changes all
others.

The stream's dimensions at the start: a few hold a constant, the last ones hold a sketch of the previous token, and
the rest the token itself. Layer 0 writes the sketch: a head whose query and key are constants turned against each
other by one position looks at the token before. Layer 1 compares sketch and token, and writes the token that was
found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_stack_meta_reference.llama.model import Attention, Llama

_EMBEDDING_SIZE = 0.05
_CONSTANTS = 4
_CONSTANT = 3.0  # in units of the embedding's size
_POSITION_SCORE = 60.0
_MATCH = 2.2
_SKETCH_GAIN = 1.2
_FOUND_GAIN = 4.0
_FAST_PAIRS = 8
"""Rotary pairs that turn fast enough to tell positions apart; the others compare content."""


@torch.no_grad()
def start(model: Llama, seed: int) -> None:
    """Fill the weights of ``model``, which needs two layers and two key/value heads at least."""
    generator = torch.Generator().manual_seed(seed)
    model.initialize(generator)
    dim, width = model.config.dim, model.config.head_dim
    token = slice(_CONSTANTS, dim - width)
    table_VD = model.tok_embeddings.weight
    table_VD *= _EMBEDDING_SIZE / table_VD.std()
    table_VD[:, :_CONSTANTS] = _CONSTANT * _EMBEDDING_SIZE
    table_VD[:, dim - width :] = 0.0
    mixing_DD = torch.linalg.qr(torch.randn(dim - width - _CONSTANTS, dim - width - _CONSTANTS, generator=generator))[0]
    sketch_KD = mixing_DD[:width]
    _look_back(_attention(model, 0), sketch_KD, token)
    found = (mixing_DD[-width:], mixing_DD[-2 * width : -width])
    for group, found_KD in enumerate(found[: model.config.n_kv_heads]):
        _look_up(_attention(model, 1), group, sketch_KD, found_KD, token)


def _attention(model: Llama, layer: int) -> Attention:
    attention = model.layers[layer].attention
    assert isinstance(attention, Attention)
    return attention


def _look_back(attention: Attention, sketch_KD: Tensor, token: slice) -> None:
    """Head 0 attends to the token before and writes its sketch into the stream's last dimensions."""
    width = attention.head_dim
    pairs = width // 2
    frequency_P = 500_000.0 ** (-torch.arange(pairs) / pairs)
    query_HD, key_GD = attention.wq.weight[:width], attention.wk.weight[:width]
    query_HD.zero_()
    key_GD.zero_()
    size = (_POSITION_SCORE**0.5) / (_CONSTANTS * _CONSTANT)
    for pair in range(_FAST_PAIRS):
        query_HD[pair, :_CONSTANTS] = size
        key_GD[pair, :_CONSTANTS] = size * torch.cos(frequency_P[pair])
        key_GD[pair + pairs, :_CONSTANTS] = size * torch.sin(frequency_P[pair])
    value_GD, output_DH = attention.wv.weight[:width], attention.wo.weight[:, :width]
    value_GD.zero_()
    value_GD[:, token] = sketch_KD
    output_DH.zero_()
    output_DH[-width:] = _SKETCH_GAIN * _EMBEDDING_SIZE * torch.eye(width)


def _look_up(attention: Attention, group: int, sketch_KD: Tensor, found_KD: Tensor, token: slice) -> None:
    """``group``'s first head attends to where the present token was the previous one, and writes what stood there."""
    width = attention.head_dim
    pairs = width // 2
    heads = attention.wq.weight.shape[0] // attention.wk.weight.shape[0]
    query = slice(group * heads * width, group * heads * width + width)
    own = slice(group * width, (group + 1) * width)
    query_HD, key_GD = attention.wq.weight[query], attention.wk.weight[own]
    query_HD.zero_()
    key_GD.zero_()
    slow = [*range(_FAST_PAIRS, pairs), *range(pairs + _FAST_PAIRS, width)]
    for row, sketched in zip(slow, range(width), strict=False):
        query_HD[row, token] = _MATCH * sketch_KD[sketched]
        key_GD[row, sketched - width] = _MATCH
    attention.wv.weight[own].zero_()
    attention.wv.weight[own, token] = found_KD
    attention.wo.weight[:, query] = 0.0
    attention.wo.weight[token, query] = _FOUND_GAIN * _EMBEDDING_SIZE * found_KD.T

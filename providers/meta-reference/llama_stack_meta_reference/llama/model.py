"""The Llama 3 network (Grattafiori et al. 2024, arXiv:2407.21783), once: training and inference run these same modules.

Weights carry Meta's names. Rotary angles turn the first half of a head against its second half, Hugging Face's order;
checkpoint.py reorders Meta's weights, which turn neighbours. What is cached, where and for which requests is the
cache's business (inference/kv_cache.py): the network sees only a ``CacheView``.

Shape suffixes: B rows of the batch, T new tokens, S all tokens so far, H query heads, G key/value heads, K head width,
D model width, F feed-forward width, V vocabulary, N weights of any shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LlamaConfig, RopeScaling


class CacheView(Protocol):
    """The keys and values of the rows in one step, as the network sees them."""

    @property
    def positions_BT(self) -> Tensor:
        """Position of each new token in its own sequence, int64; what stands at padding does not matter."""

    @property
    def mask_B1TS(self) -> Tensor | None:
        """True where a new token may look. None where T == 1 and it sees all S, or T == S and attention is causal."""

    def update(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of one layer; return (B, G, S, K) keys and values from position 0 on."""


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | str) -> Tensor:
    """Return (head_dim / 2,) float32 radians per position (Su et al. 2021, arXiv:2104.09864), stretched as Llama 3.1
    does.

    Stretching: a rotation that turns more than ``high_freq_factor`` times in the original context is left alone, one
    that turns less than ``low_freq_factor`` times is slowed by ``factor``, and between the two the frequencies are
    blended linearly by turns.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequency = 1.0 / theta**exponent
    if scaling is None:
        return frequency
    turns = scaling.original_context * frequency / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequency / scaling.factor, frequency, kept.clamp(0.0, 1.0))


def rotate(x_BHTK: Tensor, cosine_B1TK: Tensor, sine_B1TK: Tensor) -> Tensor:
    """Turn each pair (i, i + K/2) of a head by its position's angle, in float32; return the dtype of ``x``."""
    first, second = x_BHTK.float().chunk(2, dim=-1)
    turned = x_BHTK * cosine_B1TK + torch.cat((-second, first), dim=-1) * sine_B1TK
    return turned.to(x_BHTK.dtype)


class RotaryAngles(nn.Module):
    """Cosine and sine of the angle of each position."""

    frequency: Tensor

    def __init__(self, config: LlamaConfig, device: torch.device | str) -> None:
        super().__init__()
        self._config = config
        self.register_buffer("frequency", self._frequencies(device), persistent=False)

    def forward(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, each (B, 1, T, K) float32: for all heads, the two halves of a head alike."""
        # Angles in float32: bfloat16 holds whole numbers exactly only up to 256.
        angle = positions_BT[:, None, :, None].float() * self.frequency
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    def _frequencies(self, device: torch.device | str) -> Tensor:
        if torch.device(device).type == "meta":  # computing there imports torch's compiler
            return torch.empty(self._config.head_dim // 2, device=device)
        return rotary_frequencies(self._config.head_dim, self._config.rope_theta, self._config.rope_scaling, device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        # model.to(bfloat16) rounds buffers too, and to_empty() leaves them blank: both would shift every position.
        self.frequency = self._frequencies(self.frequency.device)
        return self


class RMSNorm(nn.Module):
    """Scale to unit root mean square, in float32 whatever the input is (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x_BTD.float(), self.weight.shape, eps=self.eps).to(x_BTD.dtype)


class Attention(nn.Module):
    """Causal attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: LlamaConfig, layer: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query_dim, key_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, query_dim, bias=False, device=device, dtype=dtype)
        self.wk = nn.Linear(config.dim, key_dim, bias=False, device=device, dtype=dtype)
        self.wv = nn.Linear(config.dim, key_dim, bias=False, device=device, dtype=dtype)
        self.wo = nn.Linear(query_dim, config.dim, bias=False, device=device, dtype=dtype)

    def forward(self, x_BTD: Tensor, cosine_B1TK: Tensor, sine_B1TK: Tensor, cache: CacheView | None) -> Tensor:
        q_BHTK = rotate(self._heads(self.wq(x_BTD)), cosine_B1TK, sine_B1TK)
        k_BGSK = rotate(self._heads(self.wk(x_BTD)), cosine_B1TK, sine_B1TK)
        v_BGSK = self._heads(self.wv(x_BTD))
        mask_B1TS = None
        if cache is not None:
            k_BGSK, v_BGSK = cache.update(self.layer, k_BGSK, v_BGSK)
            mask_B1TS = cache.mask_B1TS
        attended_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BGSK,
            v_BGSK,
            attn_mask=mask_B1TS,
            is_causal=mask_B1TS is None and q_BHTK.shape[2] > 1,
            enable_gqa=True,
        )
        output_BTD: Tensor = self.wo(attended_BHTK.transpose(1, 2).flatten(2))
        return output_BTD

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)


class FeedForward(nn.Module):
    """The SwiGLU feed-forward layer (Shazeer 2020, arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False, device=device, dtype=dtype)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False, device=device, dtype=dtype)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x_BTD: Tensor) -> Tensor:
        output_BTD: Tensor = self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))
        return output_BTD


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on a normalised input and added to the stream."""

    def __init__(self, config: LlamaConfig, layer: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, device=device, dtype=dtype)
        self.attention = Attention(config, layer, device=device, dtype=dtype)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, device=device, dtype=dtype)
        self.feed_forward = FeedForward(config, device=device, dtype=dtype)

    def forward(self, x_BTD: Tensor, cosine_B1TK: Tensor, sine_B1TK: Tensor, cache: CacheView | None) -> Tensor:
        attended_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cosine_B1TK, sine_B1TK, cache)
        output_BTD: Tensor = attended_BTD + self.feed_forward(self.ffn_norm(attended_BTD))
        return output_BTD


class Llama(nn.Module):
    """A Llama network: token ids in, logits out.

    On ``device="meta"`` it takes no memory until weights are assigned (checkpoint.py) or made by ``to_empty`` and
    ``initialize``.
    """

    def __init__(self, config: LlamaConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        # Given, not made by the layer: its own way to fill them imports torch's compiler on "meta", for seconds.
        embeddings_VD = torch.zeros(config.vocab_size, config.dim, device=device, dtype=dtype)
        self.tok_embeddings = nn.Embedding.from_pretrained(embeddings_VD, freeze=False)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(
            Block(config, layer, device=device, dtype=dtype) for layer in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps, device=device, dtype=dtype)
        self.output: nn.Linear | None = None
        if not config.tied_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False, device=device, dtype=dtype)
        self.rotary = RotaryAngles(config, device)

    def forward(self, tokens_BT: Tensor, cache: CacheView | None = None) -> Tensor:
        """Return (B, T, V) float32 logits for the token after each given one; see ``hidden``."""
        return self.logits(self.hidden(tokens_BT, cache))

    def hidden(self, tokens_BT: Tensor, cache: CacheView | None = None) -> Tensor:
        """Return (B, T, D) normalised states in the model's dtype, from which ``logits`` makes predictions.

        Without a cache each row is a whole sequence from position 0 on, and gradients flow. With one, the rows continue
        what the view has stored, and their keys and values are added to it. Padding goes to the right: no token looks
        at what comes after it.
        """
        if cache is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        else:
            positions_BT = cache.positions_BT
        cosine_B1TK, sine_B1TK = self.rotary(positions_BT)
        x_BTD = self.tok_embeddings(tokens_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cosine_B1TK, sine_B1TK, cache)
        normalised_BTD: Tensor = self.norm(x_BTD)
        return normalised_BTD

    def logits(self, hidden: Tensor) -> Tensor:
        """Return (..., V) float32 logits of (..., D) states: ask only where a token is sampled or a label stands."""
        if self.output is None:
            return F.linear(hidden, self.tok_embeddings.weight).float()
        logits: Tensor = self.output(hidden)
        return logits.float()

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """Move to ``device`` with memory that holds anything; torch's own way imports its compiler on "meta"."""
        self._apply(lambda weight: torch.empty(weight.shape, dtype=weight.dtype, device=device), recurse)  # type: ignore[no-untyped-call]
        return self

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None, *, std: float = 0.02) -> None:
        """Fill all weights for training from scratch: normal, the two projections into the stream narrower by sqrt(2 x
        layers).

        The narrowing keeps the stream's variance independent of depth (Radford et al. 2019, GPT-2, section 2.3). Norms
        start at one.
        """
        narrow = std / math.sqrt(2 * self.config.n_layers)
        for name, weight_N in self.named_parameters():
            if "norm" in name:
                weight_N.fill_(1.0)
            else:
                weight_N.normal_(0.0, narrow if name.endswith(("wo.weight", "w2.weight")) else std, generator=generator)

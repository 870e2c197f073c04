"""The Llama 3 network (Grattafiori et al. 2024, arXiv:2407.21783), once: training and inference run these same modules.

Weights carry Meta's names. Rotary angles turn the first half of a head against its second half, Hugging Face's order;
checkpoint.py reorders Meta's weights, which turn neighbours. What is cached, where and for which requests is not the
network's business: it sees only a ``CacheView`` (inference/runner.py has one).

Shape suffixes: B rows of the batch, T tokens of a row, N new tokens of all sequences side by side, H query heads, G
key/value heads, K head width, D model width, F feed-forward width, V vocabulary, W weights of any shape. A pass without
a cache is (B, T), one with a cache is ragged, (N,): what serves both names only its last dimensions, so ``x_D`` is
(B, T, D) or (N, D).
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
    """The keys and values of the sequences in one step, as the network sees them."""

    @property
    def positions_N(self) -> Tensor:
        """Position of each new token in its own sequence, int64."""

    def attend(self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """Store one layer's new keys and values, and let each new token attend to its sequence up to itself.

        Returns (N, H, K).
        """


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


def rotate(x_HK: Tensor, cosine_1K: Tensor, sine_1K: Tensor) -> Tensor:
    """Turn each pair (i, i + K/2) of a head by its position's angle, in float32; return the dtype of ``x``."""
    first, second = x_HK.float().chunk(2, dim=-1)
    turned = x_HK * cosine_1K + torch.cat((-second, first), dim=-1) * sine_1K
    return turned.to(x_HK.dtype)


class RotaryAngles(nn.Module):
    """Cosine and sine of the angle of each position."""

    frequency: Tensor

    def __init__(self, config: LlamaConfig, device: torch.device | str) -> None:
        super().__init__()
        self._config = config
        self.register_buffer("frequency", self._frequencies(device), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, each (..., 1, K) float32: for all heads, the two halves of a head alike."""
        # Angles in float32: bfloat16 holds whole numbers exactly only up to 256.
        angle = positions[..., None, None].float() * self.frequency
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

    def forward(self, x_D: Tensor) -> Tensor:
        # It computes in float32 by itself, on a GPU in one kernel where floats made beforehand would take three.
        return self.weight * F.rms_norm(x_D, self.weight.shape, eps=self.eps)


class Attention(nn.Module):
    """The matrices of causal attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: LlamaConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_dim, key_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, query_dim, bias=False, device=device, dtype=dtype)
        self.wk = nn.Linear(config.dim, key_dim, bias=False, device=device, dtype=dtype)
        self.wv = nn.Linear(config.dim, key_dim, bias=False, device=device, dtype=dtype)
        self.wo = nn.Linear(query_dim, config.dim, bias=False, device=device, dtype=dtype)

    def forward(self, x_D: Tensor, cosine_1K: Tensor, sine_1K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (..., H, K), keys and values (..., G, K); what they attend to goes through ``wo``."""
        q_HK = rotate(self._heads(self.wq(x_D)), cosine_1K, sine_1K)
        k_GK = rotate(self._heads(self.wk(x_D)), cosine_1K, sine_1K)
        return q_HK, k_GK, self._heads(self.wv(x_D))

    @property
    def n_kv_heads(self) -> int:
        """How many key/value heads it has: of a split network's, those of this rank."""
        return self.wk.weight.shape[0] // self.head_dim

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)


def attend_whole(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Let each token of a row attend to its row up to itself; returns (B, T, H, K)."""
    q_BHTK, k_BGTK, v_BGTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    attended_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=True)
    return attended_BHTK.transpose(1, 2)


class FeedForward(nn.Module):
    """The SwiGLU feed-forward layer (Shazeer 2020, arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False, device=device, dtype=dtype)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False, device=device, dtype=dtype)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x_D: Tensor) -> Tensor:
        output_D: Tensor = self.w2(F.silu(self.w1(x_D)) * self.w3(x_D))
        return output_D


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on a normalised input and added to the stream."""

    def __init__(self, config: LlamaConfig, layer: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, device=device, dtype=dtype)
        self.attention = Attention(config, device=device, dtype=dtype)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, device=device, dtype=dtype)
        self.feed_forward = FeedForward(config, device=device, dtype=dtype)

    def forward(self, x_D: Tensor, cosine_1K: Tensor, sine_1K: Tensor, cache: CacheView | None) -> Tensor:
        q_HK, k_GK, v_GK = self.before(x_D, cosine_1K, sine_1K)
        attended_HK = attend_whole(q_HK, k_GK, v_GK) if cache is None else cache.attend(self.layer, q_HK, k_GK, v_GK)
        return self.after(x_D, attended_HK)

    def before(self, x_D: Tensor, cosine_1K: Tensor, sine_1K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the tokens ask for, offer and carry: queries, keys and values."""
        projected: tuple[Tensor, Tensor, Tensor] = self.attention(self.attention_norm(x_D), cosine_1K, sine_1K)
        return projected

    def after(self, x_D: Tensor, attended_HK: Tensor) -> Tensor:
        """The stream with what was attended to, and what the feed-forward layer makes of both."""
        attended_D = x_D + self.attention.wo(attended_HK.flatten(-2))
        output_D: Tensor = attended_D + self.feed_forward(self.ffn_norm(attended_D))
        return output_D


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

    def forward(self, tokens: Tensor, cache: CacheView | None = None) -> Tensor:
        """Return (..., V) float32 logits for the token after each given one; see ``hidden``."""
        return self.logits(self.hidden(tokens, cache))

    def hidden(
        self, tokens: Tensor, cache: CacheView | None = None, run_block: Callable[..., Tensor] = Block.__call__
    ) -> Tensor:
        """Return (..., D) normalised states in the model's dtype, from which ``logits`` makes predictions.

        Without a cache ``tokens`` are (B, T), each row is a whole sequence from position 0 on, and gradients flow.
        Padding goes to the right: no token looks at what comes after it. With a cache they are (N,): the new tokens of
        all sequences side by side, which continue what the view has stored and are added to it. ``run_block`` may run a
        block in a way of its own; it is called as ``Block.forward`` is.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device) if cache is None else cache.positions_N
        cosine_1K, sine_1K = self.rotary(positions)
        x_D = self.tok_embeddings(tokens)
        for layer in self.layers:
            x_D = run_block(layer, x_D, cosine_1K, sine_1K, cache)
        normalised_D: Tensor = self.norm(x_D)
        return normalised_D

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
        for name, weight_W in self.named_parameters():
            if "norm" in name:
                weight_W.fill_(1.0)
            else:
                weight_W.normal_(0.0, narrow if name.endswith(("wo.weight", "w2.weight")) else std, generator=generator)

"""The network in training: the modules that serve, with what the job adds to them, behind one forward pass.

``Network`` is the root that everything is wrapped around, shards by FSDP included. Its weights keep model.py's names,
below ``llama.``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again_for_gradients

from llama_stack.errors import InvalidRequestError

from ..llama.lora import TARGETS, LoraAdapter
from ..llama.model import Block, Llama
from .head import label_log_probs, summed_log_prob
from .layers import AdaptedLinear, FrozenLinear, NF4Linear, product_dtype
from .plan import AdapterSettings
from .samples import Packed, PackedView

_SCORE_STD = 0.02
Wanted = Literal["sum", "log_probs", "scores"]


class Head(nn.Module):
    """What states are turned into: log-probabilities of labels by the output matrix, or scores by a row."""

    def __init__(self, output: nn.Linear | AdaptedLinear | None, score: nn.Linear | None) -> None:
        super().__init__()
        self.output, self.score = output, score

    def forward(
        self, states_LD: Tensor, labels_L: Tensor | None, table_VD: Tensor | None, is_summed: bool = False
    ) -> Tensor:
        """Log-probabilities of labels, each or summed; ``table_VD`` is the output where it is the embedding table.

        Without labels the score of each state, (L,), always in float32.
        """
        if labels_L is None:
            assert self.score is not None
            with torch.autocast(states_LD.device.type, enabled=False):
                scores_L1: Tensor = self.score(states_LD.float())
            return scores_L1[:, 0]
        weight_VD = self.output.effective() if isinstance(self.output, AdaptedLinear) else table_VD
        if isinstance(self.output, nn.Linear):
            weight_VD = self.output.weight
        assert weight_VD is not None
        states_LD = states_LD.to(product_dtype(states_LD))
        return (summed_log_prob if is_summed else label_log_probs)(states_LD, weight_VD, labels_L)


class Network(nn.Module):
    """A Llama in training, with the head of its kind.

    ``llama.output`` stands at ``head.output`` instead; a network with a ``score`` has none.
    """

    def __init__(self, llama: Llama, score: nn.Linear | None = None) -> None:
        super().__init__()
        self.llama = llama
        output, llama.output = llama.output, None
        self.head = Head(None if score is not None else output, score)
        self.is_checkpointing = False

    def forward(self, packed: Packed, wanted: Wanted) -> Tensor:
        """Return what is ``wanted``, float32.

        ``sum``: the summed log-probability of all labels, a scalar; ``log_probs``: that of each sequence, (B,);
        ``scores``: the score of each sequence at its last token, (B,).
        """
        view = PackedView(packed.lengths, packed.tokens_N.device)
        run: Callable[..., Tensor] = Block.__call__
        if self.is_checkpointing and torch.is_grad_enabled():
            run = partial(run_again_for_gradients, use_reentrant=False)
        states_ND = self.llama.hidden(packed.tokens_N, view, run)
        if wanted == "scores":
            scores_B: Tensor = self.head(states_ND[packed.ends_B], None, None)
            return scores_B
        table_VD = self.llama.tok_embeddings.weight if self.llama.config.tied_embeddings else None
        logs: Tensor = self.head(states_ND[packed.places_L], packed.labels_L, table_VD, wanted == "sum")
        if wanted == "sum":
            return logs
        return logs.new_zeros(len(packed.lengths)).index_add(0, packed.owners_L, logs)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What training changes, by name."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}

    @property
    def adapted(self) -> dict[str, AdaptedLinear]:
        """The matrices with adapters, by model.py's names, such as ``layers.0.attention.wq``."""
        return {
            name.removeprefix("llama.").removeprefix("head."): module
            for name, module in self.named_modules()
            if isinstance(module, AdaptedLinear)
        }


def new_score(llama: Llama, seed: int) -> nn.Linear:
    """The row of a new reward model, small and random by the seed."""
    score = nn.Linear(llama.config.dim, 1, bias=False)
    with torch.no_grad():
        score.weight.normal_(std=_SCORE_STD, generator=torch.Generator().manual_seed(seed))
    return score.to(llama.tok_embeddings.weight.device)


def keep_trained_in_float32(network: Network) -> None:
    """Make all weights trained ones, in float32: 16 bits would swallow most of what an update adds to them."""
    network.float().requires_grad_(True)


def freeze(network: Network, *, is_rounded: bool) -> None:
    """Let nothing train, and keep matrices as they are stored or, ``is_rounded``, in NF4; the rest in float32."""
    network.requires_grad_(False)
    if network.head.score is not None:
        network.head.score.requires_grad_(True)
    for name, matrix in list(_matrices(network.llama)):
        frozen: nn.Linear | NF4Linear = matrix
        if is_rounded:
            frozen = NF4Linear(matrix.in_features, matrix.out_features, device=matrix.weight.device)
            frozen.fill(matrix.weight)
        _replace(network.llama, name, FrozenLinear(frozen))
    for module in network.modules():
        if not isinstance(module, nn.Linear | nn.Embedding | NF4Linear):
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.float()
    # The stream of states is float32 whatever the table is stored in.
    network.llama.tok_embeddings.register_forward_hook(lambda _module, _inputs, states: states.float())


def add_adapters(
    network: Network,
    settings: AdapterSettings,
    seed: int,
    *,
    has_magnitude: bool = False,
    begun: LoraAdapter | None = None,
) -> None:
    """Put adapters on a frozen network: new ones as ``settings`` say, or those of ``begun``, to go on with.

    Raises ``InvalidRequestError`` for an output that is the embedding table.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = set(settings.attention) | ({"w1", "w2", "w3"} if settings.is_on_mlp else set())
    scale = settings.alpha / settings.rank
    for name, frozen in _frozen(network.llama):
        if (name in begun.pairs) if begun is not None else name.rpartition(".")[2] in wanted:
            rank = begun.rank if begun is not None else settings.rank
            adapted = AdaptedLinear(frozen.matrix, rank, scale, has_magnitude=has_magnitude, generator=generator)
            if begun is not None:
                pair = begun.pairs[name]
                with torch.no_grad():
                    adapted.down.copy_(pair.down_RI)
                    adapted.up.copy_(pair.up_OR / scale)
            _replace(network.llama, name, adapted)
    if settings.is_on_output and begun is None:
        output = network.head.output
        if not isinstance(output, nn.Linear):
            raise InvalidRequestError(
                "apply_lora_to_output: this model's output is its embedding table, which an adapter cannot add to; "
                "leave it out, or train with algorithm full"
            )
        network.head.output = AdaptedLinear(
            output, settings.rank, scale, has_magnitude=has_magnitude, generator=generator
        )


def _matrices(llama: Llama) -> Iterator[tuple[str, nn.Linear]]:
    for layer in range(len(llama.layers)):
        for target in TARGETS.values():
            name = f"layers.{layer}.{target}"
            matrix = llama.get_submodule(name)
            assert isinstance(matrix, nn.Linear)
            yield name, matrix


def _frozen(llama: Llama) -> list[tuple[str, FrozenLinear]]:
    return [(name, module) for name, module in llama.named_modules() if isinstance(module, FrozenLinear)]


def _replace(llama: Llama, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(llama.get_submodule(owner), leaf, module)

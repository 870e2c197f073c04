"""Trains the tiny model from nothing: tokenizer, weights, and a checkpoint that can be resumed at any time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.multiprocessing as processes
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llama_stack_meta_reference.llama.chat_format import ChatFormat
from llama_stack_meta_reference.llama.config import LlamaConfig
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.llama.tokenizer import Tokenizer
from llama_stack_meta_reference.tiny.cases import Phase, training_cases
from llama_stack_meta_reference.tiny.samples import Batch, Encoder, batches
from llama_stack_meta_reference.tiny.start import start
from llama_stack_meta_reference.tiny.tokenizer_training import train_tokenizer

VOCABULARY = 2048
JOINED_WORDS = 220
TOKENIZER_CASES = 20_000
LONGEST_SAMPLE = 512

CONFIG = LlamaConfig(
    dim=160,
    n_layers=6,
    n_heads=4,
    n_kv_heads=2,
    head_dim=40,
    ffn_dim=448,
    vocab_size=VOCABULARY,
    norm_eps=1e-5,
    rope_theta=500_000.0,
    rope_scaling=None,
    max_context=2048,
    tied_embeddings=True,
)


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train. The same plan on the same machine gives the same weights."""

    seed: int = 1
    steps: int = 5400
    batches: int = 2
    """Batches a step, whose gradients are averaged."""
    batch_tokens: int = 2560
    matrix_rate: float = 0.02
    """Learning rate of the layers' matrices, which Muon updates (Jordan et al. 2024)."""
    table_rate: float = 0.003
    """Learning rate of the embedding table and the norms, which AdamW updates (arXiv:1711.05101)."""
    warm_up_steps: int = 30
    decay_step: int = 1000
    """From here on the rates fall linearly, to ``plain_rate`` at ``plain_step`` and to nothing at ``closing_step``."""
    plain_step: int = 2000
    """From here on the cases are like those that are measured."""
    plain_rate: float = 0.47
    closing_step: int = 4200
    """From here on the model learns to give up too, at rates that fall from ``closing_rate`` to nothing."""
    closing_rate: float = 0.2
    drill_steps: int = 300
    """Steps in which a part of the cases are copying tasks: that skill comes first, all others rest on it."""
    drill_share: float = 0.5
    echoes: float = 0.08
    """The share of ``Encoder.echo`` samples that come on top of the cases."""
    stumbles: float = 0.3
    """The share of cases in which the assistant repeats itself once and has to find the way back."""
    surrenders: float = 0.3
    """The share of cases, after ``closing_step``, in which it has lost its way and has to end its turn."""
    average_decay: float = 0.99
    """Of the running average of the weights, which is what gets measured and kept."""
    clip_norm: float = 1.0

    def rate(self, step: int) -> float:
        """The share of the learning rates that applies at ``step``."""
        if step < self.plain_step:
            fallen = (step - self.decay_step) / max(self.plain_step - self.decay_step, 1)
            return min(1.0, (step + 1) / self.warm_up_steps, 1.0 - fallen * (1.0 - self.plain_rate))
        if step < self.closing_step:
            return self.plain_rate * (self.closing_step - step) / max(self.closing_step - self.plain_step, 1)
        return self.closing_rate * (self.steps - step) / max(self.steps - self.closing_step, 1)


def tokenizer_from_cases(seed: int, cases: int = TOKENIZER_CASES, vocabulary: int = VOCABULARY) -> tokenizers.Tokenizer:
    """The tokenizer learnt from the texts of ``cases`` training cases."""
    texts: list[str] = []
    render = ChatFormat(_NoVocabulary()).render
    for case in islice(training_cases(seed), cases):
        rendered = render(case.messages, case.tools) if case.messages else case.text
        texts += filter(None, re.split(r"<\|\w+\|>", rendered))
    return train_tokenizer(texts, vocabulary, JOINED_WORDS)


class _NoVocabulary(Tokenizer):
    """Enough of a tokenizer to render prompts as text, before there is one."""

    def __init__(self) -> None:
        super().__init__(lambda text: [], {0: b""}, {})

    def special(self, name: str) -> int | None:
        return 0


class _Float32Attention(TorchFunctionMode):
    """Attention in float32 under autocast: on a CPU its bfloat16 kernel is the slower one, by up to 2.5 times."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            attended: Tensor = func(*(tensor.float() for tensor in args), **(kwargs or {}))
        return attended.to(args[0].dtype)


class Exchange:
    """Where the processes that train together add up their gradients: shared memory, and a barrier to meet at."""

    def __init__(self, workers: int, config: LlamaConfig = CONFIG) -> None:
        self.workers = workers
        self._sent = torch.zeros(workers, 1 + config.parameter_count).share_memory_()  # type: ignore[no-untyped-call]
        self._barrier = processes.get_context("spawn").Barrier(workers)

    def add_up(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Replace each of ``tensors`` by its sum over all workers, which must all call this."""
        torch.cat([tensor.flatten() for tensor in tensors], out=self._sent[rank])
        self._barrier.wait()
        total = self._sent.sum(0)
        self._barrier.wait()
        start = 0
        for tensor in tensors:
            tensor.copy_(total[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()


class Trainer:
    """A model in training. ``run`` yields after each step; state can be saved between steps.

    The batches of a step are shared out among the workers of ``exchange``, of which this is number ``rank``; each of
    them runs the same code. Without an exchange this one does them all in turn, to the same result but for rounding.
    """

    def __init__(
        self,
        plan: Plan,
        encoder: Encoder,
        config: LlamaConfig = CONFIG,
        *,
        rank: int = 0,
        exchange: Exchange | None = None,
    ) -> None:
        self.plan = plan
        self.step = 0
        self._encoder = encoder
        self._rank, self._exchange = rank, exchange
        self._workers = exchange.workers if exchange else 1
        if plan.batches % self._workers:
            raise ValueError(f"{self._workers} workers cannot share {plan.batches} batches evenly")
        self._pool = 0
        self._pool_step = 0
        self._next = 0
        self.model = Llama(config, device="cpu", dtype=torch.float32)
        start(self.model, plan.seed)
        self.average = Llama(config, device="cpu", dtype=torch.float32).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        matrices = [p for name, p in self.model.named_parameters() if p.ndim == 2 and "tok_embeddings" not in name]
        others = [p for name, p in self.model.named_parameters() if p.ndim != 2 or "tok_embeddings" in name]
        self._optimizers = (
            (torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.01), plan.matrix_rate),
            (torch.optim.AdamW(others, lr=plan.table_rate, betas=(0.9, 0.98), weight_decay=0.0), plan.table_rate),
        )

    def run(self) -> Iterator[tuple[int, float]]:
        """Train until the plan's last step; yields (steps done, loss of the step in nats a token)."""
        while self.step < self.plan.steps:
            pool = self._batches()
            while self._next + self.plan.batches <= len(pool):
                taken = pool[self._next : self._next + self.plan.batches]
                loss = self._train(taken[self._rank :: self._workers])
                self._next += self.plan.batches
                self.step += 1
                yield self.step, loss
                if self.step == self.plan.steps:
                    return
            self._pool += 1
            self._pool_step = self.step
            self._next = 0

    def _batches(self) -> list[Batch]:
        plan = self.plan
        phases: dict[Phase, float] = {"plain" if self._pool_step >= plan.plain_step else "wide": 1.0}
        if self._pool_step < plan.drill_steps:
            phases = {"drill": plan.drill_share, "wide": 1 - plan.drill_share}
        return batches(
            self._encoder,
            plan.seed,
            self._pool,
            tokens=plan.batch_tokens,
            longest=LONGEST_SAMPLE,
            phases=phases,
            echoes=plan.echoes,
            stumbles=plan.stumbles,
            surrenders=plan.surrenders if self._pool_step >= plan.closing_step else 0,
        )

    def _train(self, own: Sequence[Batch]) -> float:
        total = torch.zeros(())
        for batch in own:
            with torch.autocast("cpu", torch.bfloat16), _Float32Attention():
                loss = loss_of(self.model, batch) / self.plan.batches
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if self._exchange:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self._exchange.add_up(self._rank, [total, *gradients])
        nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip_norm)
        rate = self.plan.rate(self.step)
        for optimizer, full_rate in self._optimizers:
            optimizer.param_groups[0]["lr"] = full_rate * rate
            optimizer.step()  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
        # Early on the average would mostly hold the random start, so it follows faster then.
        decay = min(self.plan.average_decay, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return float(total)

    def save(self, path: Path) -> None:
        """Write everything that ``load`` needs, whole or not at all."""
        state = {"model": self.model.state_dict(), "average": self.average.state_dict(), "step": self.step}
        state |= {"pool": self._pool, "pool_step": self._pool_step, "next": self._next}
        state |= {"optimizers": [optimizer.state_dict() for optimizer, _ in self._optimizers]}
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from where ``save`` was called."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.step, self._pool, self._next = state["step"], state["pool"], state["next"]
        self._pool_step = state["pool_step"]
        for (optimizer, _), saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def loss_of(model: Llama, batch: Batch) -> Tensor:
    """Mean cross-entropy, in nats, over the tokens that are to be learnt; logits are made only there."""
    states_ND = model.hidden(batch.tokens_BT).flatten(0, 1)[batch.places_N]
    return F.cross_entropy(model.logits(states_ND), batch.targets_N)

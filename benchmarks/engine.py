"""How fast the engine is beside transformers and llama.cpp, and how near to what the machine can do at all.

    python benchmarks/engine.py                           # the small network, all types of weights
    python benchmarks/engine.py --network 1b --types float16 int8 --streams 1 8 --peers llama.cpp

Llama networks with random weights: `125m` (width 768, 12 layers, vocabulary 32,000) and `1b` (the shape of Llama 3.2
1B). A run gives each stream a prompt of its own and lets it write on. Ours goes through the whole engine: its thread,
scheduler, sampling and delivery to an event loop, with look-up and prefix reuse off. Prefill is prompt tokens by the
time to the last stream's first token, in which ours already decodes for those that are done; decode is the tokens that
come after every stream has its first, by their time. transformers does the same work by its own forward passes with
its dynamic cache, float32; llama.cpp through its C interface (gguf_peer.py), where its package is installed. Sides
alternate and medians of `--runs` count.

Limits are measured in the same run: reading (the sum of a tensor as large as the weights, all threads) and float32
multiplication (a square product). `of limit` is the bytes of weights that a token must read by that reading speed, for
one stream; for a prefill it is the float32 operations of its layers, which types with integer arithmetic may exceed.
A second table says
what each type costs in exactness (quality.py).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from llama_stack_meta_reference.inference.engine import Engine, Generation, Ticket
from llama_stack_meta_reference.inference.kv_cache import blocks_for
from llama_stack_meta_reference.inference.local_executor import LocalExecutor
from llama_stack_meta_reference.inference.native_runner import NativeRunner
from llama_stack_meta_reference.inference.runner import Runner, TorchRunner
from llama_stack_meta_reference.llama.config import LlamaConfig
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.native.matrix import zeros_to_stream
from quality import print_quality

from llama_stack.apis.common import SamplingParams

_SMALL = LlamaConfig(
    dim=768,
    n_layers=12,
    n_heads=12,
    n_kv_heads=12,
    head_dim=64,
    ffn_dim=2048,
    vocab_size=32_000,
    norm_eps=1e-5,
    rope_theta=500_000.0,
    rope_scaling=None,
    max_context=2048,
    tied_embeddings=False,
)
NETWORKS = {
    "125m": _SMALL,
    "1b": replace(
        _SMALL, dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=8192, vocab_size=128_256, tied_embeddings=True
    ),
}
BITS = {"float32": 32.0, "float16": 16.0, "int8": 8.25, "int4": 4.5}
TYPES = (*BITS, "plain")
"""Of ours; ``plain`` is torch in float32, without compiled kernels."""
PEER = "transformers"
PEERS = (PEER, "llama.cpp")
GGUF_PEERS = {"float16": "llama.cpp f16", "int8": "llama.cpp q8_0", "int4": "llama.cpp q4_0"}
"""Of llama.cpp, the side that keeps its weights as ours does."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one run, all streams together."""

    prefill: float
    decode: float


class Ours:
    """An engine over random weights."""

    def __init__(self, model: Llama, kind: str, streams: int, context: int) -> None:
        blocks = streams * blocks_for(context)
        runner: Runner
        if kind == "plain":
            runner = TorchRunner(model, blocks=blocks)
        else:
            runner = NativeRunner(deepcopy(model), kind=kind, blocks=blocks, context=context)
        self._engine = Engine(
            LocalExecutor(runner, model.config.vocab_size),
            blocks=blocks,
            context=context,
            stop_ids=frozenset(),
            max_sequences=streams,
            prefix_reuse=False,
        )

    def run(self, prompts: list[list[int]], new_tokens: int) -> Speed:
        """Generate ``new_tokens`` after each prompt."""
        return asyncio.run(self._run(prompts, new_tokens))

    async def _run(self, prompts: list[list[int]], new_tokens: int) -> Speed:
        if not self._engine.is_running:
            self._engine.start()
        began = time.perf_counter()
        tickets = [self._engine.submit([Generation(prompt, SamplingParams(), new_tokens)])[0] for prompt in prompts]
        arrivals = await asyncio.gather(*(_arrivals(ticket) for ticket in tickets))
        first = max(times[0] for times in arrivals)
        last = max(times[-1] for times in arrivals)
        later = sum(moment > first for times in arrivals for moment in times)
        prefilled = sum(map(len, prompts)) / (first - began)
        return Speed(prefilled, later / (last - first) if later else 0.0)

    def close(self) -> None:
        """Free the memory."""
        asyncio.run(self._engine.stop())


async def _arrivals(ticket: Ticket) -> list[float]:
    return [time.perf_counter() async for _ in ticket]


class LlamaCpp:
    """The other peer, over random weights of its own."""

    def __init__(self, config: LlamaConfig, name: str, streams: int, context: int) -> None:
        import gguf_peer

        self._peer = gguf_peer.LlamaCpp(config, name, streams, context, torch.get_num_threads())

    def run(self, prompts: list[list[int]], new_tokens: int) -> Speed:
        """As ``Ours.run``."""
        return Speed(*self._peer.run(prompts, new_tokens))

    def close(self) -> None:
        """Free the memory."""
        self._peer.close()


class Transformers:
    """The peer, over the same weights."""

    def __init__(self, model: Llama) -> None:
        from transformers import LlamaConfig as TheirConfig
        from transformers import LlamaForCausalLM

        theirs: Any = LlamaForCausalLM
        with torch.device("meta"):
            self._model = theirs(TheirConfig(**model.config.to_hugging_face()))
        self._model.to_empty(device="cpu")
        for name, buffer in theirs(TheirConfig(**(model.config.to_hugging_face() | _TINY))).named_buffers():
            owner, _, leaf = name.rpartition(".")
            setattr(self._model.get_submodule(owner), leaf, buffer)
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.normal_(0.0, 0.02)
        self._model.eval()

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], new_tokens: int) -> Speed:
        """As ``Ours.run``; all prompts are one batch."""
        tokens = torch.tensor(prompts)
        began = time.perf_counter()
        out = self._model(tokens, use_cache=True, logits_to_keep=1)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = self._model(token, past_key_values=out.past_key_values, use_cache=True)
        last = time.perf_counter()
        decoded = len(prompts) * (new_tokens - 1)
        return Speed(tokens.numel() / (first - began), decoded / (last - first) if decoded else 0.0)

    def close(self) -> None:
        """Free the memory."""
        del self._model


_TINY = {"num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8}
"""Sizes on which the rotary buffers do not depend."""


def read_limit(size: float) -> float:
    """GB/s at which all threads together read ``size`` bytes again and again; small ones are in a cache in part."""
    numbers = zeros_to_stream(int(size / 4), torch.float32)  # in large pages, as the weights are
    return numbers.nbytes / _fastest(numbers.sum) / 1e9


def product_limit() -> float:
    """GFLOP/s of a float32 product of 2048 x 2048."""
    square = torch.randn(2048, 2048)
    return 2 * 2048**3 / _fastest(lambda: square @ square) / 1e9


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


@contextmanager
def side(name: str, model: Llama, streams: int, context: int) -> Iterator[Ours | Transformers | LlamaCpp]:
    """One of ``TYPES`` or a peer, in memory for the block."""
    running: Ours | Transformers | LlamaCpp
    if name == PEER:
        running = Transformers(model)
    elif name in GGUF_PEERS.values():
        running = LlamaCpp(model.config, name, streams, context)
    else:
        running = Ours(model, name, streams, context)
    try:
        yield running
    finally:
        running.close()


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description="The engine's speed beside transformers' and the machine's limits.")
    parser.add_argument("--network", choices=NETWORKS, default="125m")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=[*BITS])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=[p for p in PEERS if find_spec(p.replace(".", "_"))]
    )
    parser.add_argument("--cases", type=int, default=200, help="held-out cases a skill for the quality table; 0: none")
    options = parser.parse_args()

    config = NETWORKS[options.network]
    model = Llama(config, device="cpu", dtype=torch.float32)
    model.initialize(torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    product = product_limit()
    table = config.vocab_size * config.dim
    layers = config.parameter_count - table * (1 if config.tied_embeddings else 2)
    weights = {kind: (layers + table) * bits / 8 for kind, bits in BITS.items()}
    read = {kind: read_limit(weights[kind]) for kind in options.types if kind in BITS}
    print(f"{options.network}: {config.parameter_count / 1e6:.0f} M weights", end=", ")
    print(f"{(layers + table) / 1e6:.0f} M of them read for a token")
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    speeds = ", ".join(f"{weights[kind] / 1e6:.0f} MB at {speed:.1f} GB/s" for kind, speed in read.items())
    print(f"{threads}: reading {speeds}; float32 {product:.0f} GFLOP/s")
    names = list(options.types)
    if "transformers" in options.peers:
        names.append(PEER)
    if "llama.cpp" in options.peers:
        names += [GGUF_PEERS[kind] for kind in options.types if kind in GGUF_PEERS]
    print(f"prompt {options.prompt}, {options.new} new tokens, medians of {options.runs}; tokens/s of all streams\n")
    print(
        "| streams | side | prefill | decode | decode by transformers' | by llama.cpp's: prefill, decode | of limit |"
    )
    print("|---|---|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(1)
    for streams in options.streams:
        prompts = torch.randint(0, config.vocab_size, (streams, options.prompt), generator=generator).tolist()
        found: dict[str, list[Speed]] = {name: [] for name in names}
        with ExitStack() as stack:
            context = options.prompt + options.new + 1
            sides = {name: stack.enter_context(side(name, model, streams, context)) for name in names}
            for running in sides.values():
                running.run([prompt[:16] for prompt in prompts], 2)  # warm up
            for _ in range(options.runs):
                for name, running in sides.items():
                    found[name].append(running.run(prompts, options.new))
        middle = {
            name: Speed(median(s.prefill for s in speeds), median(s.decode for s in speeds))
            for name, speeds in found.items()
        }
        for name, speed in middle.items():
            theirs = f"{speed.decode / middle[PEER].decode:.2f}" if PEER in middle else ""
            peer = middle.get(GGUF_PEERS.get(name, ""))
            other = f"{speed.prefill / peer.prefill:.2f}, {speed.decode / peer.decode:.2f}" if peer else ""
            limit = f"{speed.prefill * 2 * layers / (product * 1e9):.2f}"
            if streams == 1 and name in BITS:
                limit += f", {speed.decode * weights[name] / (read[name] * 1e9):.2f}"
            print(
                f"| {streams} | {name} | {speed.prefill:.0f} | {speed.decode:.1f} | {theirs} | {other} | {limit} |",
                flush=True,
            )
    if options.cases:
        print_quality(model, options.types, options.cases)


if __name__ == "__main__":
    main()

"""How near the engine comes to what a GPU can do at all, over the shape of Llama 3 8B with random weights.

    python benchmarks/gpu.py                       # on the first GPU
    python benchmarks/gpu.py --shape tiny          # anywhere: shows that everything runs, and its figures mean nothing

Weights are made on the device; no checkpoint is needed. Every stream has a prompt of its own, and goes through the
whole engine: thread, scheduler, sampling, delivery, with look-up and prefix reuse off. What is measured, each with its
goal on one GPU of the H200's class:

    one stream       decode, as a share of the bytes that a token must read at the measured read bandwidth   >= 0.80
    many streams     256 of 512 in and 256 out: tokens a second while all decode; and from the first submit to
                     the last token, prompts included                                                       >= 15,000
    rounded          one stream with float8, and int8, by the one in bfloat16                               >= 1.5
    first token      32 streams that ask again as soon as they are answered; median                         <= 150 ms

`--graphs no` switches CUDA graphs off and `--graphs compiled` has torch compile them first, to see what either gains;
how long it takes is logged. The read bandwidth is the sum of a large tensor.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median, quantiles

import torch
from llama_stack_meta_reference.inference.engine import Engine, Generation, Ticket
from llama_stack_meta_reference.inference.kv_cache import BLOCK_TOKENS, blocks_for
from llama_stack_meta_reference.inference.local_executor import LocalExecutor
from llama_stack_meta_reference.inference.paged_views import FLASH_BLOCK_TOKENS, has_flash
from llama_stack_meta_reference.inference.runner import TorchRunner, TorchStorage
from llama_stack_meta_reference.llama.config import LlamaConfig
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.llama.quantize import RoundedLinear, empty_rounded

from llama_stack.apis.common import SamplingParams

_8B = LlamaConfig(
    dim=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    ffn_dim=14336,
    vocab_size=128_256,
    norm_eps=1e-5,
    rope_theta=500_000.0,
    rope_scaling=None,
    max_context=8192,
    tied_embeddings=False,
)
SHAPES = {
    "8b": _8B,
    "tiny": replace(_8B, dim=128, n_layers=2, n_heads=8, n_kv_heads=2, head_dim=16, ffn_dim=352, vocab_size=512),
}


@dataclass(frozen=True)
class Load:
    """How much is asked of it."""

    prompt: int
    new: int
    streams: int
    asking: int
    """Streams that ask again and again."""


LOADS = {"8b": Load(512, 256, 256, 32), "tiny": Load(48, 16, 24, 4)}
REPEATS = 4
"""How often each of those that ask again does, the first not counted."""


def random_network(config: LlamaConfig, storage: TorchStorage, device: torch.device) -> Llama:
    """A network made where it runs, never there twice."""
    if storage.rounding is None:
        model = Llama(config, device="meta", dtype=storage.dtype).to_empty(device=device)
        model.initialize()
        return model.requires_grad_(False)
    model = empty_rounded(config, storage.rounding, device=device, dtype=storage.dtype)
    model.initialize()
    for matrix in model.modules():
        if isinstance(matrix, RoundedLinear):
            matrix.fill(torch.randn(matrix.outputs, matrix.inputs, device=device, dtype=storage.dtype).mul_(0.02))
    return model.requires_grad_(False)


@contextmanager
def engine_of(
    config: LlamaConfig, storage: TorchStorage, device: torch.device, *, streams: int, context: int, graphs: str
) -> Iterator[Engine]:
    """An engine over random weights, with room for all streams at once."""
    block_tokens = FLASH_BLOCK_TOKENS if has_flash(device, storage.dtype, config.head_dim) else BLOCK_TOKENS
    blocks = streams * blocks_for(context, block_tokens)
    runner = TorchRunner(
        random_network(config, storage, device),
        blocks=blocks,
        block_tokens=block_tokens,
        static_rows=streams if graphs != "no" else 0,
        context=context,
        compiler="inductor" if graphs == "compiled" else None,
    )
    engine = Engine(
        LocalExecutor(runner, config.vocab_size),
        blocks=blocks,
        context=context,
        stop_ids=frozenset(),
        max_sequences=streams,
        queue_size=streams,
        prefill_tokens=2048,
        prefix_reuse=False,
    )
    engine.start()
    try:
        yield engine
    finally:
        asyncio.run(engine.stop())


def prompts(count: int, length: int, config: LlamaConfig) -> list[list[int]]:
    """Random tokens."""
    drawn: list[list[int]] = torch.randint(0, config.vocab_size, (count, length)).tolist()
    return drawn


async def arrivals(engine: Engine, prompt: list[int], new: int) -> list[float]:
    """When each token of an answer came."""
    ticket: Ticket = engine.submit([Generation(prompt, SamplingParams(), new)])[0]
    return [time.perf_counter() async for _ in ticket]


async def together(engine: Engine, asked: list[list[int]], new: int) -> tuple[float, float]:
    """Tokens a second of all streams: while all of them decode, and over the whole time."""
    began = time.perf_counter()
    times = await asyncio.gather(*(arrivals(engine, prompt, new) for prompt in asked))
    first, last = max(came[0] for came in times), max(came[-1] for came in times)
    later = sum(moment > first for came in times for moment in came)
    return later / (last - first), len(asked) * new / (last - began)


async def first_tokens(engine: Engine, streams: int, load: Load, config: LlamaConfig) -> list[float]:
    """Seconds to the first token of each request, from streams that ask again as soon as they are answered."""

    async def ask(number: int) -> list[float]:
        waits = []
        for turn, prompt in enumerate(prompts(1 + REPEATS, load.prompt, config)):
            began = time.perf_counter()
            # At first all ask at once; answers of different lengths set them apart.
            length = 1 + load.new * (number + 1) // streams if turn == 0 else load.new
            came = await arrivals(engine, prompt, length)
            if turn:
                waits.append(came[0] - began)
        return waits

    return [wait for waits in await asyncio.gather(*map(ask, range(streams))) for wait in waits]


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second."""
    large = torch.ones(1 << (30 if device.type == "cuda" else 26), device=device)
    times = []
    for _ in range(8):
        _wait_for(device)
        began = time.perf_counter()
        large.sum()
        _wait_for(device)
        times.append(time.perf_counter() - began)
    return large.nbytes / min(times)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The engine's speed on a GPU, beside what the GPU can do.")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--graphs", choices=("no", "yes", "compiled"), default="yes")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type != "cuda" and options.shape != "tiny":
        parser.error("there is no GPU; --shape tiny runs anywhere")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    config, load, graphs = SHAPES[options.shape], LOADS[options.shape], options.graphs
    floats = torch.bfloat16 if device.type == "cuda" else torch.float32
    context = load.prompt + load.new + 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "a CPU"
    bandwidth = read_bandwidth(device)
    print(f"{name}, torch {torch.__version__}: reading {bandwidth / 1e9:.0f} GB/s; graphs: {graphs}")
    print(f"{options.shape}: {config.parameter_count / 1e9:.2f} billion weights, prompts of {load.prompt}")

    storages = [TorchStorage(floats), TorchStorage(floats, "float8"), TorchStorage(floats, "int8")]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        storages = [storage for storage in storages if storage.rounding != "float8"]
    one: dict[str, float] = {}
    print("\n| one stream | tokens/s | of what reading allows | by the first |\n|---|---|---|---|")
    for storage in storages:
        with engine_of(config, storage, device, streams=1, context=context, graphs=graphs) as engine:
            asyncio.run(together(engine, prompts(1, load.prompt, config), 2))  # warm up
            rates = [
                asyncio.run(together(engine, prompts(1, load.prompt, config), load.new))[0] for _ in range(options.runs)
            ]
        one[storage.name] = median(rates)
        read = storage.weight_bytes(config) - config.vocab_size * config.dim * floats.itemsize
        share = one[storage.name] * read / bandwidth
        ratio = one[storage.name] / one[storages[0].name]
        print(f"| {storage.name} | {one[storage.name]:.1f} | {share:.2f} | {ratio:.2f} |", flush=True)

    with engine_of(config, storages[0], device, streams=load.streams, context=context, graphs=graphs) as engine:
        asyncio.run(together(engine, prompts(load.streams, load.prompt, config), 2))
        rates_of_many = [
            asyncio.run(together(engine, prompts(load.streams, load.prompt, config), load.new))
            for _ in range(options.runs)
        ]
        waits = asyncio.run(first_tokens(engine, load.asking, load, config))
    decode, whole = (median(rates) for rates in zip(*rates_of_many, strict=True))
    print(f"\n{load.streams} streams of {load.prompt} in, {load.new} out, {storages[0].name}:")
    print(f"  {decode:.0f} tokens/s while all decode, {whole:.0f} with the prompts")
    milliseconds = [1000 * wait for wait in waits]
    print(f"{load.asking} streams that ask again and again: first token after")
    print(f"  {median(milliseconds):.0f} ms in the median, {quantiles(milliseconds, n=20)[-1]:.0f} ms at 95 %")


if __name__ == "__main__":
    main()

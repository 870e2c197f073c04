"""What the engine saves where texts repeat: prompts that begin as earlier ones did, answers that quote their prompts.

    python benchmarks/repeats.py
    python benchmarks/repeats.py --kind int8 --runs 5

Prefix reuse: two requests share their first `--prompt` tokens, and each has four of its own; how much sooner the second
has its first token. Look-up decoding: the tokens a second of one greedy stream after its first token, with guessing and
without, on the same engine settings; the answers must be the same token by token, or the script fails. The texts are
those that the tiny model was made for (held-out cases: calls of a tool whose arguments stand in the request, answers
from a passage), and a text that has repeated itself, with a 125 M network of random weights whose first two layers copy
what stood before (tiny/start.py), so that it goes on repeating. Runs alternate and medians count.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from statistics import median

import torch
from engine import NETWORKS
from llama_stack_meta_reference.inference.engine import Engine, Generation
from llama_stack_meta_reference.inference.kv_cache import blocks_for
from llama_stack_meta_reference.inference.local_executor import LocalExecutor
from llama_stack_meta_reference.inference.native_runner import NativeRunner
from llama_stack_meta_reference.inference.runner import Runner, TorchRunner
from llama_stack_meta_reference.llama.checkpoint import load_model, open_checkpoint
from llama_stack_meta_reference.llama.model import Attention, Llama
from llama_stack_meta_reference.llama.tokenizer import load_tokenizer
from llama_stack_meta_reference.tiny.__main__ import CHECKPOINT
from llama_stack_meta_reference.tiny.cases import held_out_cases
from llama_stack_meta_reference.tiny.samples import Encoder
from llama_stack_meta_reference.tiny.start import start

from llama_stack.apis.common import SamplingParams

LOOKUP_TOKENS = 11
"""What a distribution has by default."""
_CASES = 40
_SEED = 5
_FOUND_GAIN = 4.0


def engine(model: Llama, kind: str, context: int, *, lookup: int = 0, stop_ids: frozenset[int] = frozenset()) -> Engine:
    """An engine for one stream, not started."""
    blocks = 2 * blocks_for(context)
    runner: Runner
    if kind == "plain":
        runner = TorchRunner(deepcopy(model), blocks=blocks)
    else:
        runner = NativeRunner(deepcopy(model), kind=kind, blocks=blocks, context=context)
    return Engine(
        LocalExecutor(runner, model.config.vocab_size),
        blocks=blocks,
        context=context,
        stop_ids=stop_ids,
        lookup_tokens=lookup,
    )


async def answer(engine: Engine, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """The greedy answer, and the seconds from asking to each of its tokens."""
    began = time.perf_counter()
    (ticket,) = engine.submit([Generation(prompt, SamplingParams(), new_tokens)])
    tokens, times = [], []
    async for sampled in ticket:
        tokens.append(sampled.token)
        times.append(time.perf_counter() - began)
    return tokens, times


async def prefix_reuse(kind: str, prompt: int, runs: int) -> None:
    """Print how much sooner the second of two requests has its first token."""
    model = random_network()
    draw = random.Random(_SEED)
    firsts: list[tuple[float, float]] = []
    running = engine(model, kind, prompt + 64)
    running.start()

    def words(count: int) -> list[int]:
        return [draw.randrange(model.config.vocab_size) for _ in range(count)]

    for _ in range(runs + 1):  # the first one warms up
        shared = words(prompt)
        alone = await answer(running, shared + words(4), 1)
        again = await answer(running, shared + words(4), 1)
        firsts.append((alone[1][0], again[1][0]))
    await running.stop()
    alone_seconds, again_seconds = (median(column) for column in zip(*firsts[1:], strict=True))
    print(
        f"| {prompt} shared tokens | {alone_seconds * 1e3:.1f} ms | {again_seconds * 1e3:.1f} ms "
        f"| {alone_seconds / again_seconds:.1f} |",
        flush=True,
    )


async def look_up(
    name: str,
    model: Llama,
    kind: str,
    prompts: Sequence[list[int]],
    new_tokens: int,
    stop_ids: frozenset[int],
    runs: int,
) -> None:
    """Print the speed of one stream with guessing beside that without."""
    context = max(map(len, prompts)) + new_tokens + 1
    sides = {lookup: engine(model, kind, context, lookup=lookup, stop_ids=stop_ids) for lookup in (0, LOOKUP_TOKENS)}
    speeds: dict[int, list[float]] = {lookup: [] for lookup in sides}
    answers: dict[int, list[list[int]]] = {}
    for running in sides.values():
        running.start()
        await answer(running, prompts[0], 4)
    for _ in range(runs):
        for lookup, running in sides.items():
            found = [await answer(running, prompt, new_tokens) for prompt in prompts]
            answers[lookup] = [tokens for tokens, _ in found]
            decoded = [times for _, times in found if len(times) > 1]
            seconds = sum(times[-1] - times[0] for times in decoded)
            speeds[lookup].append(sum(len(times) - 1 for times in decoded) / seconds)
    counted = sides[LOOKUP_TOKENS].metrics()
    for running in sides.values():
        await running.stop()
    if answers[0] != answers[LOOKUP_TOKENS]:
        raise SystemExit(f"{name}: guessing changed an answer")
    plain, guessing = median(speeds[0]), median(speeds[LOOKUP_TOKENS])
    accepted = counted.accepted_tokens / max(1, counted.drafted_tokens)
    print(f"| {name} | {plain:.0f} | {guessing:.0f} | {guessing / plain:.2f} | {accepted:.0%} |", flush=True)


def random_network() -> Llama:
    """The 125 M network with random weights."""
    model = Llama(NETWORKS["125m"], device="cpu", dtype=torch.float32).requires_grad_(False)
    model.initialize(torch.Generator().manual_seed(_SEED))
    return model


def copying_network() -> Llama:
    """As large, and it writes what followed the present token before; what it finds must outweigh the other layers."""
    config = replace(NETWORKS["125m"], tied_embeddings=True)
    model = Llama(config, device="cpu", dtype=torch.float32).requires_grad_(False)
    start(model, _SEED)
    found = model.layers[1].attention
    assert isinstance(found, Attention)
    found.wo.weight *= _FOUND_GAIN
    return model


def copying_prompts(vocabulary: int) -> list[list[int]]:
    """Texts of 48 random tokens that stand there four times."""
    draw = random.Random(_SEED)
    return [[draw.randrange(vocabulary) for _ in range(48)] * 4 for _ in range(3)]


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description="What prefix reuse and look-up decoding save.")
    parser.add_argument("--kind", choices=("float32", "float16", "int8", "int4", "plain"), default="float16")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    print(f"weights {options.kind}, {torch.get_num_threads()} threads, medians of {options.runs}\n")
    print("| prefix reuse, 125 M | first token | of the second request | ratio |\n|---|---|---|---|")
    asyncio.run(prefix_reuse(options.kind, options.prompt, options.runs))

    print("\n| look-up decoding, one stream | tokens/s without | with | ratio | of the guesses right |")
    print("|---|---|---|---|---|")
    checkpoint = open_checkpoint(CHECKPOINT)
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    tiny = load_model(checkpoint, device="cpu", dtype=torch.float32).requires_grad_(False)
    encoder = Encoder(tokenizer)
    for skill in ("tool_call", "passage"):
        prompts = [encoder.prompt(case) for case in held_out_cases(skill, _CASES, _SEED)]
        asyncio.run(
            look_up(f"tiny, {skill}", tiny, options.kind, prompts, 128, frozenset(tokenizer.stop_ids), options.runs)
        )
    copying = copying_network()
    prompts = copying_prompts(copying.config.vocab_size)
    asyncio.run(look_up("125 M that copies", copying, options.kind, prompts, 128, frozenset(), options.runs))


if __name__ == "__main__":
    main()

"""What HTTP leaves of the engine's speed: tokens a second through the server, by the engine alone, and by llama-server.

    python benchmarks/serving.py --streams 8 32
    python benchmarks/serving.py --llama-server path/to/llama-server

The 125 M network of engine.py with random float16 weights, in a model folder made on the spot, with the tiny model's
tokenizer. Each stream sends a prompt of its own and takes 128 tokens. `engine` is our engine in this process, without
server and worker process; `server` is ``llama-stack run`` in a process of its own, asked from this one, a connection a
stream; `llama-server` is llama.cpp's own server with as many slots, float16 too, over the same prompts as token ids.
All tokens that came out are divided by the time from the first request to the last token, prompts included. Sides
alternate, and medians count. Gaps are those between two events of a stream, which are its tokens but where several
make one character.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from urllib.request import urlopen

import torch
from engine import NETWORKS
from llama_stack_meta_reference.config import ModelConfig
from llama_stack_meta_reference.inference.engine import Engine, Generation
from llama_stack_meta_reference.inference.serving import load
from llama_stack_meta_reference.llama.checkpoint import save_hugging_face
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.llama.tokenizer import Tokenizer, load_tokenizer
from llama_stack_meta_reference.tiny.__main__ import CHECKPOINT

from llama_stack.apis.common import SamplingParams

_SEED = 5
_PROMPT = 512
_NEW = 128
_SETTINGS = {"device": "cpu", "lookup_tokens": 0, "prefix_reuse": False, "context_tokens": 2 * (_PROMPT + _NEW)}


@dataclass(frozen=True)
class Run:
    """What one run of all streams gave."""

    speed: float
    """Tokens a second."""
    gaps: list[float]
    """Seconds between two tokens of one stream."""


Side = Callable[[list[str], list[list[int]]], Coroutine[None, None, Run]]


def make_checkpoint(folder: Path) -> Tokenizer:
    """Write the model folder; none of its answers ends before it is told to."""
    shutil.copy(CHECKPOINT / "tokenizer.json", folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    model = Llama(NETWORKS["125m"], device="cpu", dtype=torch.float32).requires_grad_(False)
    model.initialize(torch.Generator().manual_seed(_SEED))
    assert model.output is not None
    model.output.weight[list(tokenizer.specials.values())] = 0  # the likeliest token has a logit above zero
    save_hugging_face(model, folder, dtype=torch.float16)
    return tokenizer


def prompts_of(tokenizer: Tokenizer, streams: int, draw: random.Random) -> tuple[list[str], list[list[int]]]:
    """Texts of about 512 tokens, and their ids as the server will have them."""
    words = [piece for token in range(tokenizer.vocab_size) if (piece := _word(tokenizer, token))]
    texts = ["".join(draw.choice(words) for _ in range(_PROMPT)) for _ in range(streams)]
    return texts, [tokenizer.encode(text) for text in texts]


def _word(tokenizer: Tokenizer, token: int) -> str:
    piece = tokenizer.token_bytes(token) if token not in tokenizer.specials.values() else b""
    text = piece.decode("ascii", "ignore")
    return text if re.fullmatch(" [a-z]+", text) else ""


def engine_side(engine: Engine) -> Side:
    """The engine in this process."""

    async def run(_texts: list[str], prompts: list[list[int]]) -> Run:
        if not engine.is_running:
            engine.start()
        began = time.perf_counter()
        tickets = [engine.submit([Generation(prompt, SamplingParams(), _NEW)])[0] for prompt in prompts]

        async def times(index: int) -> list[float]:
            return [time.perf_counter() async for _ in tickets[index]]

        return _run(began, await asyncio.gather(*map(times, range(len(prompts)))))

    return run


def server_side(url: str) -> Side:
    """``llama-stack run``, by the draft's streamed completion."""

    async def run(texts: list[str], _prompts: list[list[int]]) -> Run:
        bodies = [{"model": "m", "content": text, "max_tokens": _NEW, "stream": True} for text in texts]
        return await _over_http(url, "/inference/completion", bodies, b'"stop_reason":"max_tokens"')

    return run


def llama_server_side(url: str) -> Side:
    """llama.cpp's server, by its own streamed completion."""

    async def run(_texts: list[str], prompts: list[list[int]]) -> Run:
        fixed = {"n_predict": _NEW, "ignore_eos": True, "stream": True, "temperature": 0, "cache_prompt": False}
        bodies = [{"prompt": prompt, **fixed} for prompt in prompts]
        return await _over_http(url, "/completion", bodies, b'"stop_type":"limit"')

    return run


async def _over_http(url: str, path: str, bodies: list[dict[str, object]], end: bytes) -> Run:
    """Send all bodies at once and note when each event came; the last one says that there were 128 tokens."""
    host, port = url.removeprefix("http://").split(":")

    async def times(body: dict[str, object]) -> list[float]:
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 22)
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(content) + content)
        found: list[float] = []
        data = b""
        while piece := await reader.read(1 << 16):
            data += piece
            found += [time.perf_counter()] * piece.count(b"data: ")
        writer.close()
        if end not in data:
            raise SystemExit(f"a stream ended otherwise: {data[-300:]!r}")
        return found

    began = time.perf_counter()
    return _run(began, await asyncio.gather(*map(times, bodies)))


def _run(began: float, times: list[list[float]]) -> Run:
    gaps = [after - before for stream in times for before, after in pairwise(stream)]
    return Run(len(times) * _NEW / (max(stream[-1] for stream in times) - began), gaps)


@contextmanager
def served(folder: Path, streams: int) -> Iterator[str]:
    """Our server over the folder, ready."""
    settings = {**_SETTINGS, "checkpoint": str(folder), "max_sequences": streams}
    config = {"models": {"m": settings}}
    distribution = {
        "version": 1,
        "name": "benchmark",
        "providers": {"inference": [{"provider": "meta-reference", "config": config}]},
        "storage": {"url": "sqlite::memory:"},
        "server": {"port": 0},
    }
    file = folder / f"serving-{streams}.yaml"
    file.write_text(json.dumps(distribution))  # JSON is YAML
    command = [str(Path(sys.executable).with_name("llama-stack")), "run", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://[0-9.:]+", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line}")
        yield found[0]
    finally:
        process.terminate()
        process.wait()


@contextmanager
def llama_served(binary: str, streams: int, port: int) -> Iterator[str]:
    """llama-server over the same shape, ready."""
    from gguf_file import write_gguf

    path = Path(tempfile.gettempdir()) / "llama-stack-bench-serving-F16.gguf"
    if not path.exists():
        write_gguf(NETWORKS["125m"], "F16", path, with_vocabulary=True)
    sizes = ["-c", str(streams * 1024), "-np", str(streams), "-b", "512", "-ub", "512"]
    threads = ["-t", str(torch.get_num_threads()), "-tb", str(torch.get_num_threads())]
    command = [binary, "-m", str(path), "--host", "127.0.0.1", "--port", str(port), *sizes, *threads]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                with urlopen(f"{url}/health") as answer:
                    if answer.status == 200:
                        break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


@asynccontextmanager
async def own_engine(folder: Path, streams: int) -> AsyncIterator[Engine]:
    """Our engine over the folder, in this process."""
    settings = {**_SETTINGS, "checkpoint": str(folder), "max_sequences": streams, "process": "shared"}
    engine = load("m", ModelConfig.model_validate(settings), None).engine
    yield engine
    await engine.stop()


async def measure(folder: Path, tokenizer: Tokenizer, streams: int, runs: int, llama_server: str | None) -> None:
    """Print the rows of one number of streams."""
    draw = random.Random(_SEED)
    with ExitStack() as stack:
        sides: dict[str, Side] = {"server": server_side(stack.enter_context(served(folder, streams)))}
        if llama_server:
            url = stack.enter_context(llama_served(llama_server, streams, 8199))
            sides["llama-server"] = llama_server_side(url)
        async with own_engine(folder, streams) as engine:
            sides = {"engine": engine_side(engine), **sides}
            found: dict[str, list[Run]] = {name: [] for name in sides}
            for turn in range(runs + 1):
                for name, side in sides.items():
                    run = await side(*prompts_of(tokenizer, streams, draw))
                    if turn:  # the first one warms up
                        found[name].append(run)
    speeds = {name: median(run.speed for run in of_side) for name, of_side in found.items()}
    for name, speed in speeds.items():
        gaps = sorted(gap for run in found[name] for gap in run.gaps if gap > 0)
        middle, late = median(gaps), gaps[int(len(gaps) * 0.95)]
        by_engine = f"{speed / speeds['engine']:.2f}" if name == "server" else ""
        by_peer = f"{speed / speeds['llama-server']:.2f}" if name == "server" and llama_server else ""
        print(
            f"| {streams} | {name} | {speed:.0f} | {by_engine} | {by_peer} "
            f"| {middle * 1e3:.1f} ms | {late * 1e3:.1f} ms | {late / middle:.2f} |",
            flush=True,
        )


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description="Tokens a second through HTTP beside the engine's own.")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--llama-server", default=shutil.which("llama-server"), help="llama.cpp's server, to compare")
    options = parser.parse_args()
    print(
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; prompts of {_PROMPT}, {_NEW} new tokens a stream"
    )
    print(f"medians of {options.runs}; tokens/s of all streams, prompts' time included\n")
    print(
        "| streams | side | tokens/s | by the engine's | by llama-server's | gap, median | gap, p95 | p95 by median |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as home:
        tokenizer = make_checkpoint(Path(home))
        for streams in options.streams:
            asyncio.run(measure(Path(home), tokenizer, streams, options.runs, options.llama_server))


if __name__ == "__main__":
    main()

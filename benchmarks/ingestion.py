"""What a large insert into a memory bank does to the streams of the same server: the gaps between their tokens.

    make bench-ingestion
    make bench-ingestion ARGS="--embedder builtin:hashing --megabytes 10"

A client takes one streamed answer of the tiny model after another and notes how long each token lets it wait: while
nothing else happens; beside a process that keeps one core busy multiplying matrices, as an embedder does; and while
another client inserts documents in one request. What the last has beyond the second is what the server loses by
working on the insert, for the cores are shared in both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

DISTRIBUTION = """version: 1
name: ingestion
providers:
  inference:
    - provider: meta-reference
      config: {{ models: {{ tiny: {{ checkpoint: "builtin:tiny" }} }} }}
  memory_banks:
    - provider: sqlite
      config: {{ embedder: "{embedder}" }}
server: {{ port: 0 }}
"""
BUSY = """
import numpy as np
from threadpoolctl import threadpool_limits
threadpool_limits(1, "blas")
a = np.ones((6400, 384), np.float32)
b = np.ones((384, 1536), np.float32)
while True:
    a @ b
"""
DOCUMENT_CHARACTERS = 100_000


@contextmanager
def serving(embedder: str, home: Path) -> Iterator[int]:
    """A server in a process of its own; its port."""
    (home / "ingestion.yaml").write_text(DISTRIBUTION.format(embedder=embedder))
    command = [str(Path(sys.executable).with_name("llama-stack")), "run", str(home / "ingestion.yaml"), "--port", "0"]
    environment = {**os.environ, "LLAMA_STACK_HOME": str(home)}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    try:
        line = next(line for line in server.stdout if "http://127.0.0.1:" in line)
        threading.Thread(target=server.stdout.read, daemon=True).start()  # so that its log never fills the pipe
        yield int(line.split("http://127.0.0.1:")[1].split()[0].split("/")[0])
    finally:
        server.terminate()
        server.wait()


def post(port: int, path: str, body: object) -> None:
    """One request that must succeed."""
    connection = HTTPConnection("127.0.0.1", port, timeout=3600)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    assert response.status == 200, answer


def gaps_of_one_stream(port: int) -> list[float]:
    """Seconds from each token of one answer to the next."""
    body = {
        "model": "tiny",
        "dialog": {"message": {"role": "user", "content": "Count from one to fifty."}},
        "sampling_params": {"temperature": 1.0, "strategy": "top_p", "top_p": 1.0},
        "max_tokens": 200,
        "stream": True,
    }
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/inference/chat_completion", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    times = [time.perf_counter() for line in response if line.startswith(b"data:")]
    return [later - earlier for earlier, later in pairwise(times)]


def gaps_until(port: int, is_over: threading.Event) -> list[float]:
    """Gaps of one stream after another."""
    gaps: list[float] = []
    while not is_over.is_set():
        gaps += gaps_of_one_stream(port)
    return gaps


def documents(megabytes: float) -> list[dict[str, object]]:
    """Sentences of made-up words, always the same ones."""
    chance = random.Random(4)
    words = ["".join(chance.choices("aeioulnrstmdkp", k=chance.randint(2, 9))) for _ in range(5000)]
    made: list[dict[str, object]] = []
    for number in range(max(int(megabytes * 1e6) // DOCUMENT_CHARACTERS, 1)):
        text = ""
        while len(text) < DOCUMENT_CHARACTERS:
            text += " ".join(chance.choices(words, k=12)).capitalize() + ". "
        content = b64encode(text.encode()).decode()
        made.append({"uuid": f"d{number}", "content": content, "metadata": {"n": number}, "mime_type": "text/plain"})
    return made


def show(name: str, gaps: list[float], note: str = "") -> None:
    cuts = quantiles(gaps, n=1000)
    figures = "".join(f"{1e3 * value:10.1f}" for value in (median(gaps), cuts[989], cuts[998], max(gaps)))
    print(f"{name:28}{len(gaps):>8}{figures}  {note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--embedder", default="auto")
    parser.add_argument("--megabytes", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=15.0, help="of the streams beside which nothing is inserted")
    arguments = parser.parse_args()
    sent = documents(arguments.megabytes)
    with tempfile.TemporaryDirectory() as folder, serving(arguments.embedder, Path(folder)) as port:
        post(port, "/memory_banks/create?bank_uuid=b&bank_name=B", [])
        gaps_of_one_stream(port)
        print(f"{'milliseconds to a token':28}{'tokens':>8}{'median':>10}{'p99':>10}{'p99.9':>10}{'longest':>10}")

        is_over = threading.Event()
        threading.Timer(arguments.seconds, is_over.set).start()
        show("nothing else", gaps_until(port, is_over))

        busy = subprocess.Popen([sys.executable, "-c", BUSY])
        try:
            is_over = threading.Event()
            threading.Timer(arguments.seconds, is_over.set).start()
            show("beside a busy process", gaps_until(port, is_over))
        finally:
            busy.terminate()
            busy.wait()

        is_over, took = threading.Event(), 0.0

        def insert() -> None:
            nonlocal took
            started = time.perf_counter()
            try:
                post(port, "/memory_bank/insert?bank_uuid=b", sent)
                took = time.perf_counter() - started
            finally:
                is_over.set()

        threading.Thread(target=insert).start()
        gaps = gaps_until(port, is_over)
        assert took, "the insert failed"
        show("during the insert", gaps, f"{len(sent)} documents, {arguments.megabytes:g} MB in {took:.1f} s")


if __name__ == "__main__":
    main()

"""How well banks are searched: questions whose words differ from those of the passage that answers them.

    python benchmarks/retrieval_quality.py

``retrieval/passages.txt`` holds a passage a line; ``questions.txt`` and ``held_out.txt`` hold a question a line with
the number of the passage that answers it. All of it was written for this purpose. What can be set in hybrid search was
set by the first of them. The second was written before anything was measured with it, for passages and ways of asking
that were drawn at random. For each set, each embedder that is installed and each mode it prints the share of questions
whose passage comes first, and among the first five, and the mean of 1 / place (MRR@10).
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llama_stack_memory import MemoryConfig
from llama_stack_memory.provider import serve_sqlite

from llama_stack.apis import MemoryBanks
from llama_stack.apis.memory_banks import MemoryBankDocument, QueryMode, QueryRequest
from llama_stack.errors import CheckpointError
from llama_stack.storage import open_store

FOLDER = Path(__file__).parent / "retrieval"
DEPTH = 10


@dataclass(frozen=True)
class Quality:
    """Shares of the questions, and the mean reciprocal rank."""

    first: float
    five: float
    mrr: float


SETS = {"tuning": "questions.txt", "held out": "held_out.txt"}


def read_passages() -> list[str]:
    """The passages; the number of the first one is 1."""
    return (FOLDER / "passages.txt").read_text(encoding="utf-8").splitlines()


def read_questions(name: str) -> list[tuple[str, str]]:
    """Each question of a set with the number of the passage that answers it."""
    lines = (FOLDER / SETS[name]).read_text(encoding="utf-8").splitlines()
    return [(question, number) for number, question in (line.split("\t") for line in lines)]


async def quality(banks: MemoryBanks, questions: Sequence[tuple[str, str]], mode: QueryMode) -> Quality:
    """Ask every question."""
    places = []
    for question, answer in questions:
        request = QueryRequest(bank_uuid="passages", text=question, k=DEPTH, mode=mode)
        found = [hit.document_uuid for hit in (await banks.query(request)).hits]
        places.append(found.index(answer) + 1 if answer in found else None)
    count = len(places)
    return Quality(
        sum(place == 1 for place in places) / count,
        sum(place is not None and place <= 5 for place in places) / count,
        sum(1 / place for place in places if place is not None) / count,
    )


async def measured(embedder: str, folder: Path) -> dict[str, dict[QueryMode, Quality]]:
    """Every set in every mode with one embedder. Raises ``CheckpointError`` where it is not installed."""
    documents = [
        MemoryBankDocument(uuid=str(number), content=text.encode(), mime_type="text/plain", metadata={})
        for number, text in enumerate(read_passages(), 1)
    ]
    config = MemoryConfig(embedder=embedder)
    async with open_store("sqlite", folder) as store, serve_sqlite(config, store.database("memory.quality")) as banks:
        await banks.create("passages", "Passages", documents)
        return {name: {mode: await quality(banks, read_questions(name), mode) for mode in QueryMode} for name in SETS}


async def main() -> None:
    """Print the table."""
    counts = ", ".join(f"{len(read_questions(name))} questions {name}" for name in SETS)
    print(f"{len(read_passages())} passages; {counts}")
    print(f"{'questions':11}{'embedder':18}{'mode':10}{'first':>8}{'in five':>9}{'MRR@10':>9}")
    for embedder in ("builtin:minilm", "builtin:hashing"):
        with tempfile.TemporaryDirectory() as folder, suppress(CheckpointError):
            for name, modes in (await measured(embedder, Path(folder))).items():
                for mode, found in modes.items():
                    print(f"{name:11}{embedder:18}{mode.value:10}{found.first:8.3f}{found.five:9.3f}{found.mrr:9.3f}")


if __name__ == "__main__":
    asyncio.run(main())

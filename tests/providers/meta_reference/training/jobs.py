"""Job folders for tests: a small base, a few rows, and a training in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llama_stack_meta_reference.training.plan import Step, TrainingPlan, read_progress
from llama_stack_meta_reference.training.progress import Progress
from llama_stack_meta_reference.training.ranks import joined
from llama_stack_meta_reference.training.trainer import Trainer

E = TypeVar("E")

WORDS = ("Paris", "Oslo", "the mat", "a lazy dog", "München", "hello world", "123", "the quick brown fox")


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def dialogs(count: int = 10) -> list[dict[str, Any]]:
    """Questions and answers of different lengths."""
    return [
        {
            "dialog": [
                message("user", f"Where is number {number}?" + " Please." * (number % 4)),
                message("assistant", f"It is in {WORDS[number % len(WORDS)]}."),
            ]
        }
        for number in range(count)
    ]


def preferences(count: int = 10) -> list[dict[str, Any]]:
    """The polite answer is chosen."""
    return [
        {
            "prompt": [message("user", f"Where is number {number}?")],
            "chosen": [message("assistant", f"It is in {WORDS[number % len(WORDS)]}, I think.")],
            "rejected": [message("assistant", f"No idea about {WORDS[number % len(WORDS)]}")],
        }
        for number in range(count)
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_job(folder: Path, base: Path, *, rows: Sequence[Mapping[str, Any]] | None = None, **plan: Any) -> Path:
    """A folder with a plan for ``base`` and its rows; ten dialogs are also the validation."""
    folder.mkdir(exist_ok=True)
    kind = plan.setdefault("kind", "sft")
    made = rows if rows is not None else dialogs() if kind == "sft" else preferences()
    write_rows(folder / "train.jsonl", made)
    values = {"base": str(base), "training": {"n_epochs": 2, "batch_size": 4}, "optimizer": {"lr": 0.01}} | plan
    TrainingPlan.model_validate_json(json.dumps(values)).save(folder)
    return folder


def train(job: Path, is_stopping: Callable[[], bool] = lambda: False) -> Trainer:
    """Do a job here; what ends it is raised."""
    plan = TrainingPlan.load(job)
    progress = Progress(job)
    try:
        with joined(plan.device) as ranks:
            trainer = Trainer(plan, job, progress, ranks)
            trainer.run(is_stopping)
            return trainer
    finally:
        progress.close()


def losses(job: Path) -> dict[int, float]:
    """The loss of each iteration that a job has told of, the last word on each."""
    return {event.iters: event.loss for event in read_progress(job) if isinstance(event, Step)}


def events(job: Path, kind: type[E]) -> list[E]:
    """The events of one kind that a job has told of."""
    return [event for event in read_progress(job) if isinstance(event, kind)]

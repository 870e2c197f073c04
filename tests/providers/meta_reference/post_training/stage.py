"""A stack that trains: a small random model, datasets, and jobs on them, by the real trainer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import llama_stack_data.plugin
import llama_stack_meta_reference.plugin
from llama_stack_meta_reference.training.plan import Step, read_progress

from llama_stack.apis import PostTraining
from llama_stack.apis.post_training import (
    JobStatus,
    PostTrainingJobStatusResponse,
    PostTrainingRLHFRequest,
    PostTrainingSFTRequest,
)
from llama_stack.distribution import Distribution
from llama_stack.plugins import discover
from llama_stack.registry import Registry
from llama_stack.stack import Stack, running
from tests.providers.meta_reference.training.jobs import dialogs, preferences, write_rows

END_SECONDS = 120.0
"""A bound for a job that does not end, not a figure."""


def distribution(folder: Path, checkpoint: Path, *, port: int = 0, **settings: Any) -> dict[str, Any]:
    """A model ``base`` (also ``llama3_8b``) and jobs; rows lie in ``folder``."""
    model = {"checkpoint": str(checkpoint), "device": "cpu", "max_sequences": 4}
    inference = {"models": {"base": model}, "aliases": {"llama3_8b": "base", "llama3_8b_chat": "base"}}
    training = {"device": "cpu", "save_every": 4} | settings
    return {
        "version": 1,
        "name": "training",
        "providers": {
            "inference": [{"provider": "meta-reference", "config": inference}],
            "datasets": [{"provider": "datasets", "config": {"fetch": {"file_roots": [str(folder)]}}}],
            "post_training": [{"provider": "meta-reference", "config": training}],
        },
        "server": {"port": port},
    }


def stack(folder: Path, described: Mapping[str, Any]) -> Stack:
    """The stack with its state in ``folder/state``."""
    plugins = discover(extra=[llama_stack_meta_reference.plugin, llama_stack_data.plugin])[:2]
    return Stack(Distribution.model_validate(described), Registry(plugins), state_folder=folder / "state")


@asynccontextmanager
async def training(folder: Path, checkpoint: Path, **settings: Any) -> AsyncIterator[Stack]:
    """A stack for the block; its state lasts."""
    async with running(stack(folder, distribution(folder, checkpoint, **settings))) as up:
        yield up


def dataset(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "rows") -> dict[str, Any]:
    """A dataset of dialogs, with one of its columns for each key of a row."""
    path = folder / f"{name}.jsonl"
    write_rows(path, rows)
    return {"columns": dict.fromkeys(rows[0], "dialog"), "content_url": path.as_uri(), "metadata": {}}


def _common(
    folder: Path, uuid: str, rows: Sequence[Mapping[str, Any]], own: Mapping[str, Any], changes: Mapping[str, Any]
) -> dict[str, Any]:
    rows_of = dataset(folder, rows, uuid)
    body: dict[str, Any] = {
        "job_uuid": uuid,
        "dataset": rows_of,
        "validation_dataset": rows_of,
        "optimizer_config": {"optimizer_type": "adamw", "lr": 0.01, "lr_min": 0.0, "weight_decay": 0.0},
        "training_config": {
            "n_epochs": 0,
            "batch_size": 2,
            "shuffle": True,
            "n_iters": 8,
            "enable_activation_checkpointing": False,
            "memory_efficient_fsdp_wrap": False,
            "fsdp_cpu_offload": False,
        },
        "hyperparam_search_config": {},
        "logger_config": {},
        **own,
    }
    for name, change in changes.items():
        body[name] = body[name] | change if isinstance(change, dict) and isinstance(body.get(name), dict) else change
    return body


def sft_body(folder: Path, uuid: str, **changes: Any) -> dict[str, Any]:
    """A body for supervised fine-tuning; ``training_config`` and its like are changed key by key."""
    adapter = {
        "lora_attn_modules": ["q_proj", "v_proj"],
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": False,
        "rank": 4,
        "alpha": 8,
    }
    adapted = {"model": "llama3_8b", "algorithm": "lora", "algorithm_config": adapter}
    return _common(folder, uuid, dialogs(), adapted, changes)


def dpo_body(folder: Path, uuid: str, finetuned_model: str, **changes: Any) -> dict[str, Any]:
    """A body for preference optimisation."""
    settings = {"reward_scale": 0.1, "reward_clip": 0.0, "epsilon": 0.0, "gamma": 0.0}
    begun = {"finetuned_model": finetuned_model, "algorithm": "dpo", "algorithm_config": settings}
    return _common(folder, uuid, preferences(), begun, changes)


def sft(folder: Path, uuid: str, **changes: Any) -> PostTrainingSFTRequest:
    """The same, read."""
    return PostTrainingSFTRequest.model_validate_json(json.dumps(sft_body(folder, uuid, **changes)))


def dpo(folder: Path, uuid: str, finetuned_model: str, **changes: Any) -> PostTrainingRLHFRequest:
    """The same, read."""
    return PostTrainingRLHFRequest.model_validate_json(json.dumps(dpo_body(folder, uuid, finetuned_model, **changes)))


async def ended(api: PostTraining, uuid: str) -> PostTrainingJobStatusResponse:
    """Follow a job's log until the job has ended; where it stands then."""
    async for _ in await api.job_logs(uuid, follow=True):  # type: ignore[union-attr]
        pass
    return await api.job_status(uuid)


async def completed(api: PostTraining, uuid: str) -> PostTrainingJobStatusResponse:
    """The same, of a job that must have come to its end."""
    status = await ended(api, uuid)
    assert status.status is JobStatus.COMPLETED, status
    return status


def losses(folder: Path) -> dict[int, float]:
    """The loss of each iteration that the job in a folder has told of, the last word on each."""
    return {event.iters: event.loss for event in read_progress(folder) if isinstance(event, Step)}

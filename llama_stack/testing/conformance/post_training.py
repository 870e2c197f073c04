"""Checks of PostTraining that need no training: what is refused, and what is said of jobs that are not there."""

from __future__ import annotations

from typing import Any

from ...apis import PostTraining
from ...apis.datasets import ColumnKind, Dataset
from ...apis.post_training import (
    FinetuningAlgorithm,
    LoraFinetuningConfig,
    OptimizerConfig,
    OptimizerType,
    PostTrainingSFTRequest,
    TrainingConfig,
)
from ...errors import InvalidRequestError, NotFoundError
from .checks import check, everything, refused
from .subject import Subject

_ROWS = "data:application/jsonl;base64,eyJ0ZXh0IjogIk9uZS4ifQp7InRleHQiOiAiVHdvLiJ9Cg=="


def _request(job: str, model: str, **more: Any) -> PostTrainingSFTRequest:
    dataset = Dataset(columns={"text": ColumnKind.TEXT}, content_url=_ROWS, metadata={})
    given: dict[str, Any] = {
        "dataset": dataset,
        "validation_dataset": dataset,
        "algorithm": FinetuningAlgorithm.LORA,
        "algorithm_config": LoraFinetuningConfig(
            lora_attn_modules=["q_proj"], apply_lora_to_mlp=False, apply_lora_to_output=False, rank=4, alpha=8
        ),
        "optimizer_config": OptimizerConfig(optimizer_type=OptimizerType.ADAMW, lr=1e-3, lr_min=1e-4, weight_decay=0.0),
        "training_config": _training(n_iters=1),
        "hyperparam_search_config": {},
        "logger_config": {},
    }
    return PostTrainingSFTRequest(job_uuid=job, model=model, **(given | more))


def _training(**more: Any) -> TrainingConfig:
    given = {
        "n_epochs": 0,
        "batch_size": 1,
        "shuffle": False,
        "n_iters": 1,
        "enable_activation_checkpointing": False,
        "memory_efficient_fsdp_wrap": False,
        "fsdp_cpu_offload": False,
    }
    return TrainingConfig(**(given | more))


@check(PostTraining)
async def a_job_that_is_not_there_is_404(subject: Subject) -> None:
    """Status, logs, artifacts and a cancel of a job that does not exist are a 404."""
    training, job = subject.client.post_training, subject.new_id("no-job")
    for operation in (training.job_status, training.job_logs, training.job_artifacts, training.cancel_job):
        await refused(operation(job), NotFoundError)


@check(PostTraining)
async def what_cannot_be_trained_is_not_queued(subject: Subject) -> None:
    """A request that could never end or never begin is refused before it is a job."""
    training, model = subject.client.post_training, subject.new_id("no-model")
    job = subject.new_id("job")
    await refused(training.supervised_fine_tune(_request(job, model)), InvalidRequestError, NotFoundError)
    endless = _request(job, model, training_config=_training(n_iters=0))
    await refused(training.supervised_fine_tune(endless), InvalidRequestError, NotFoundError)
    await refused(training.job_status(job), NotFoundError)


@check(PostTraining)
async def jobs_are_listed(subject: Subject) -> None:
    """The list of jobs is there, and has no job twice."""
    jobs = await everything(await subject.client.post_training.list_jobs())
    names = [job.job_uuid for job in jobs]
    assert len(set(names)) == len(names), "a job is listed twice"

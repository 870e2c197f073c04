"""The PostTraining API: takes jobs that can be done, says how they are, and serves what they make.

The work is done elsewhere: ``runner`` runs the queue, ``plans`` checks requests, ``serving`` makes models of results.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pydantic import JsonValue

from llama_stack.apis import Datasets, Inference, PostTraining
from llama_stack.apis.datasets import HoldDatasetRequest, ReleaseDatasetsRequest
from llama_stack.apis.post_training import (
    Checkpoint,
    JobStatus,
    JobSummary,
    PostTrainingJobArtifactsResponse,
    PostTrainingJobLogStream,
    PostTrainingJobStatusResponse,
    PostTrainingRLHFRequest,
    PostTrainingSFTRequest,
)
from llama_stack.errors import InvalidRequestError, NotFoundError, StackError
from llama_stack.storage import Database, Folder

from ..training.plan import TrainingPlan
from .checkpoints import Beginnings, result, saved
from .config import PostTrainingConfig
from .jobs import MIGRATIONS, Job, Jobs, Kind
from .plans import Request, beginning_faults, plan_of, refuse, request_faults
from .progress import MOST_LINES, Progress, Reader, log_line
from .rows import check_first, write_rows
from .runner import TRAINER, Runner
from .serving import Serving

logger = logging.getLogger("llama_stack.meta_reference.post_training")

_FOLLOW_SECONDS = 0.2
"""How often a log that is followed is looked at."""


@asynccontextmanager
async def serve(
    config: PostTrainingConfig,
    database: Database,
    folder: Folder,
    datasets: Datasets,
    inference: Inference | None,
    *,
    trainer: str = TRAINER,
) -> AsyncIterator[MetaReferencePostTraining]:
    """Take up the jobs that an earlier server left, and run those that come, for the block.

    At its end trainers save and end; their jobs go on at the next start. ``trainer`` is the module that trains.
    """
    await database.migrate(MIGRATIONS)
    jobs = Jobs(database)
    provider = MetaReferencePostTraining(config, jobs, folder.path, datasets, inference)
    runner = Runner(
        jobs,
        folder.path,
        prepare=provider.prepare,
        publish=provider.serving.publish,
        ended=provider.settle,
        max_running=config.max_running,
        max_attempts=config.max_attempts,
        processes=config.processes,
        trainer=trainer,
    )
    provider.runner = runner
    try:
        await provider.settle_all()
        await provider.serving.start()
        await runner.start()
        yield provider
    finally:
        await runner.stop()
        await provider.serving.stop()


class MetaReferencePostTraining(PostTraining):
    """Supervised fine-tuning, preference optimisation and reward models, on the network that serves."""

    runner: Runner

    def __init__(
        self,
        config: PostTrainingConfig,
        jobs: Jobs,
        folder: Path,
        datasets: Datasets,
        inference: Inference | None,
    ) -> None:
        self.serving = Serving(jobs, folder, inference, config.served_models)
        self._config = config
        self._jobs = jobs
        self._folder = folder
        self._datasets = datasets
        self._inference = inference
        self._beginnings = Beginnings(config, jobs, folder, inference)
        self._progress: dict[str, Progress] = {}
        self._reading = asyncio.Lock()

    async def owns(self, resource: str) -> bool:
        """Whether there is such a job."""
        try:
            await self._jobs.get(resource)
        except NotFoundError:
            return False
        return True

    async def supervised_fine_tune(self, request: PostTrainingSFTRequest) -> None:
        """Queue a fine-tuning job. Raises ``ModelNotFoundError`` naming the models that can be trained."""
        await self._take(request, "sft")

    async def preference_optimize(self, request: PostTrainingRLHFRequest) -> None:
        """Queue an alignment job, which goes on with an adapter, or with all weights where there is none."""
        await self._take(request, "dpo")

    async def train_reward_model(self, request: PostTrainingSFTRequest) -> None:
        """Queue the training of a reward model."""
        await self._take(request, "reward")

    async def _take(self, request: Request, kind: Kind) -> None:
        body = json.dumps(request.model_dump(mode="json", exclude_none=True), sort_keys=True)
        if await self._jobs.is_known(request.job_uuid, kind, body):
            return
        refuse(request_faults(request, kind, self._config))
        if isinstance(request, PostTrainingSFTRequest):
            beginning = await self._beginnings.model(request.model)
        else:
            beginning = await self._beginnings.url(request.finetuned_model)
        is_tied = await asyncio.to_thread(_is_tied, beginning.weights)
        refuse(beginning_faults(request, beginning, is_tied=is_tied))
        await self._refuse_taken_name(request.job_uuid)
        plan = plan_of(request, kind, beginning, self._config)
        await check_first(self._datasets, request.dataset)
        await check_first(self._datasets, request.validation_dataset)
        job = Job(request.job_uuid, kind, body, plan.model_dump_json(), beginning.base, beginning.parent)
        if not await self._jobs.add(job, queue_size=self._config.queue_size):
            return
        try:
            await self._hold(request)
        except StackError:
            await self._jobs.forget(request.job_uuid)
            raise
        self.runner.look()

    async def _refuse_taken_name(self, name: str) -> None:
        models = await self._inference.models() if self._inference is not None else []
        if any(model.model == name for model in models):
            raise InvalidRequestError(
                f"job_uuid {name!r} is the name of a model that is served; what the job makes is served under its id, "
                "so choose another",
                param="job_uuid",
            )

    async def _hold(self, request: Request) -> None:
        for dataset in (request.dataset, request.validation_dataset):
            await self._datasets.hold(HoldDatasetRequest(user=request.job_uuid, dataset=dataset))

    async def job_status(self, job_uuid: str) -> PostTrainingJobStatusResponse:
        """Where a job stands; ``resources_allocated`` says how far it is, how fast and how long it will take."""
        job = await self._jobs.get(job_uuid)
        progress = await self._progress_of(job)
        resources: dict[str, JsonValue] = progress.resources()
        if job.attempts > 1:
            resources["attempts"] = job.attempts
        if job.reason is not None:
            resources["reason"] = job.reason
        if job.status is JobStatus.COMPLETED and (refusal := self.serving.refusal(job_uuid)) is not None:
            resources["not_served"] = refusal
        return PostTrainingJobStatusResponse(
            job_uuid=job_uuid,
            status=job.status,
            scheduled_at=job.scheduled_at,
            started_at=job.started_at,
            completed_at=job.completed_at,
            resources_allocated=resources,
            checkpoints=await self._checkpoints(job, progress),
        )

    async def job_logs(
        self, job_uuid: str, follow: bool = False
    ) -> PostTrainingJobLogStream | AsyncIterator[PostTrainingJobLogStream]:
        """A line an event, ``TIME EVENT name=value ...``; a snapshot has the newest 10,000 and says so."""
        job = await self._jobs.get(job_uuid)
        if follow:
            return self._followed(job)
        return PostTrainingJobLogStream(job_uuid=job_uuid, log_lines=await asyncio.to_thread(self._newest_lines, job))

    def _newest_lines(self, job: Job) -> list[str]:
        reader, lines = Reader(self._folder / job.folder_name), _first_lines(job)
        left_out = 0
        while events := reader.more():
            lines += map(log_line, events)
            left_out += max(0, len(lines) - MOST_LINES)
            del lines[:-MOST_LINES]
        if left_out:
            lines[0] = f"... {left_out + 1} earlier lines; follow=true sends all of them"
        return lines

    async def _followed(self, job: Job) -> AsyncGenerator[PostTrainingJobLogStream, None]:
        yield PostTrainingJobLogStream(job_uuid=job.uuid, log_lines=_first_lines(job))
        reader = Reader(self._folder / job.folder_name)
        while True:
            is_ended = (await self._jobs.get(job.uuid)).is_ended  # looked up first: what was written before is read
            while events := await asyncio.to_thread(reader.more):
                yield PostTrainingJobLogStream(job_uuid=job.uuid, log_lines=[log_line(event) for event in events])
            if is_ended:
                return
            await asyncio.sleep(_FOLLOW_SECONDS)

    async def job_artifacts(self, job_uuid: str) -> PostTrainingJobArtifactsResponse:
        """The checkpoints that are there, oldest first; the last one of a completed job is its result."""
        job = await self._jobs.get(job_uuid)
        checkpoints = await self._checkpoints(job, await self._progress_of(job))
        return PostTrainingJobArtifactsResponse(job_uuid=job_uuid, checkpoints=checkpoints)

    async def list_jobs(self) -> AsyncIterator[JobSummary]:
        """All jobs, newest first."""
        found = await self._jobs.newest_first()

        async def lines() -> AsyncGenerator[JobSummary, None]:
            for uuid, status in found:
                yield JobSummary(job_uuid=uuid, status=status)

        return lines()

    async def cancel_job(self, job_uuid: str) -> None:
        """End a job as ``failed``, for the draft knows no other word; a trainer that runs saves first."""
        await self._jobs.cancel(job_uuid)
        await self.runner.cancel(job_uuid)
        try:
            await self.settle(job_uuid)
        except StackError as error:  # cancelled it is; the next start releases what it held
            logger.warning("what job %r held is not released yet: %s", job_uuid, error)

    async def prepare(self, job: Job, folder: Path) -> None:
        """Write a job's rows into its folder. Raises what reading the datasets raises."""
        request = _request_of(job)
        await write_rows(self._datasets, request.dataset, job.kind, folder / "train.jsonl")
        await write_rows(self._datasets, request.validation_dataset, job.kind, folder / "validation.jsonl")

    async def settle(self, uuid: str) -> None:
        """What follows the end of a job: its datasets are released, and what is not completed is not served."""
        job = await self._jobs.get(uuid)
        if not job.is_ended:
            return
        await self._datasets.release(ReleaseDatasetsRequest(user=uuid))
        await self._jobs.released(uuid)
        if job.status is not JobStatus.COMPLETED:
            await self.serving.withdraw(uuid)

    async def settle_all(self) -> None:
        """At a start: hold and release what an earlier server was about to."""
        for job in await self._jobs.holding():
            if job.is_ended:
                await self.settle(job.uuid)
            else:
                await self._hold(_request_of(job))

    async def _progress_of(self, job: Job) -> Progress:
        async with self._reading:
            progress = self._progress.setdefault(job.uuid, Progress(self._folder / job.folder_name))
            return await asyncio.to_thread(progress.refresh)

    async def _checkpoints(self, job: Job, progress: Progress) -> list[Checkpoint]:
        folder = self._folder / job.folder_name
        found = await asyncio.to_thread(saved, folder)
        if job.status is JobStatus.COMPLETED and (path := await asyncio.to_thread(result, folder)) is not None:
            found.append(Checkpoint(iters=progress.iters, path=path.as_uri()))
        return found


def _request_of(job: Job) -> Request:
    kind = PostTrainingRLHFRequest if job.kind == "dpo" else PostTrainingSFTRequest
    return kind.model_validate_json(job.request)


def _first_lines(job: Job) -> list[str]:
    assert job.scheduled_at is not None
    time = job.scheduled_at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    plan = TrainingPlan.model_validate_json(job.plan)
    return [f"{time} scheduled kind={job.kind} algorithm={plan.algorithm} parent={job.parent}"]


def _is_tied(weights: Path) -> bool:
    """Whether a model's output is its embedding table, as far as its config says so."""
    try:
        with (weights / "config.json").open("rb") as file:
            return json.loads(file.read(2_000_000)).get("tie_word_embeddings") is True
    except (OSError, ValueError, AttributeError, RecursionError):
        return False

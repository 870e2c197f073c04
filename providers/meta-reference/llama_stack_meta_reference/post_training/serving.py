"""What jobs have made becomes models of the inference API: at once, after a restart, and when inference comes back.

A job's id is the model's name. Adapters join their base in memory; of whole weights the newest few are served. Where
this stack's inference does not serve the base, the result is a checkpoint and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from llama_stack.apis.inference import Inference, LocalModel
from llama_stack.apis.post_training import JobStatus
from llama_stack.errors import StackError

from ..training.plan import TrainingPlan
from .checkpoints import is_adapter, result
from .jobs import Job, Jobs

logger = logging.getLogger("llama_stack.meta_reference.post_training")

_LOOK_SECONDS = 5.0
"""How often it is looked whether everything that was served still is: a provider that broke down comes back empty."""


class Serving:
    """Keeps the results of completed jobs served, as far as ``most_models`` and the machine allow."""

    def __init__(self, jobs: Jobs, folder: Path, inference: Inference | None, most_models: int) -> None:
        self._jobs = jobs
        self._folder = folder
        self._inference = inference
        self._most_models = most_models
        self._refused: dict[str, str] = {}
        self._known: dict[str, LocalModel | None] = {}
        self._turn = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None

    def refusal(self, uuid: str) -> str | None:
        """Why the result of a completed job is not served, if that was tried."""
        return self._refused.get(uuid)

    async def start(self) -> None:
        """Serve what earlier servers have made, and go on looking after it."""
        if self._inference is not None:
            await self.serve()
            self._watch = asyncio.create_task(self._look(), name="what jobs have made")

    async def stop(self) -> None:
        """Look after nothing any more; what is served stays so."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self.serve()

    async def publish(self, job: Job) -> None:
        """Serve the result of a job that is about to be completed."""
        self._known[job.uuid] = await self._made(job)
        await self.serve(job.uuid)

    async def withdraw(self, uuid: str) -> None:
        """Serve the result of a job no more, which was ended in the last moment."""
        if self._known.pop(uuid, None) is not None and self._inference is not None:
            await self._inference.withdraw_local(uuid)

    async def serve(self, newest: str | None = None) -> None:
        """Serve every result that should be and is not, oldest first, for a later one may need an earlier one.

        ``newest`` is a job that counts as completed already.
        """
        if self._inference is None:
            return
        async with self._turn:
            try:
                await self._serve_missing(self._inference, newest)
            except StackError as error:
                logger.warning("what jobs have made cannot be served for now: %s", error)

    async def _serve_missing(self, inference: Inference, newest: str | None) -> None:
        served = {model.model for model in await inference.local_models()}
        if not served:  # nothing here runs models of this machine
            return
        made = await self._all_made(newest)
        needed = {model.base for model in made if model.is_adapter}
        whole = [model.model for model in made if not model.is_adapter and model.model not in needed]
        dropped = set(whole[: max(0, len(whole) - self._most_models)])
        for model in made:
            if model.model in dropped and model.model in served:
                logger.info("%r is not served any more: newer jobs are (served_models)", model.model)
                await inference.withdraw_local(model.model)
            elif model.model not in served and model.model not in dropped and model.model not in self._refused:
                await self._serve(inference, model)

    async def _serve(self, inference: Inference, model: LocalModel) -> None:
        try:
            if not await inference.serve_local(model):
                self._refused[model.model] = f"its base {model.base!r} is not served here"
        except StackError as error:
            if not error.retriable:
                self._refused[model.model] = error.detail
            logger.warning("the result of job %r is not served: %s", model.model, error)

    async def _all_made(self, newest: str | None) -> list[LocalModel]:
        """What every completed job has made that can be served, oldest first."""
        completed = [uuid for uuid, status in await self._jobs.newest_first() if status is JobStatus.COMPLETED]
        if newest is not None and newest not in completed:
            completed.insert(0, newest)
        for uuid in completed:
            if uuid not in self._known:
                self._known[uuid] = await self._made(await self._jobs.get(uuid))
        return [model for uuid in reversed(completed) if (model := self._known[uuid]) is not None]

    async def _made(self, job: Job) -> LocalModel | None:
        folder = await asyncio.to_thread(result, self._folder / job.folder_name)
        if folder is None or job.base is None or job.kind == "reward":
            return None
        plan = TrainingPlan.model_validate_json(job.plan)
        return LocalModel(
            model=job.uuid,
            folder=folder,
            base=job.base,
            is_adapter=await asyncio.to_thread(is_adapter, folder),
            lineage={
                "job": job.uuid,
                "base": job.base,
                "parent": job.parent,
                "kind": job.kind,
                "algorithm": plan.algorithm,
            },
        )

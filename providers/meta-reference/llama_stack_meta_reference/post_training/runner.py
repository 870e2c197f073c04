"""Runs the jobs of the queue in their order, each by a trainer in a process of its own, until they have ended.

What a job is lies in the store and what it has done in its folder, so that whatever is killed, trainer, server or
machine, the next start goes on from the newest checkpoint. A job that is started again and again without a new one
fails, with the reason.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from llama_stack.errors import StackError

from ..training.plan import EXIT_BUSY, PLAN_FILE, Failed, Finished, Stopped
from . import launch
from .checkpoints import iterations_saved, result
from .jobs import Job, Jobs
from .progress import Progress, append, note

T = TypeVar("T")
logger = logging.getLogger("llama_stack.meta_reference.post_training")

TRAINER = "llama_stack_meta_reference.training"
STOP_SECONDS = 2.0
"""How long a trainer may take to save when the server stops, which has three seconds for all."""
CANCEL_SECONDS = 20.0
"""How long a trainer may take to save when its job is cancelled."""
_FIRST_RETRY_SECONDS = 0.1
_LONGEST_RETRY_SECONDS = 30.0
_BUSY_SECONDS = 1.0
"""How often it is looked whether a trainer of another server has left a folder."""
_LOG_FILE = "trainer.log"


@dataclass
class _Work:
    """A job that is being worked on."""

    task: asyncio.Task[None] | None = None
    process: asyncio.subprocess.Process | None = None
    is_cancelled: bool = False


class Runner:
    """Works on the queue from ``start`` to ``stop``.

    ``prepare`` writes a job's rows into its folder, ``publish`` has its result served; ``ended`` is told of each job
    that has ended, and may be told again after a restart. ``trainer`` is the module that is run.
    """

    def __init__(
        self,
        jobs: Jobs,
        folder: Path,
        *,
        prepare: Callable[[Job, Path], Awaitable[None]],
        publish: Callable[[Job], Awaitable[None]],
        ended: Callable[[str], Awaitable[None]],
        max_running: int,
        max_attempts: int,
        processes: int = 1,
        trainer: str = TRAINER,
    ) -> None:
        self._jobs = jobs
        self._folder = folder
        self._prepare = prepare
        self._publish = publish
        self._ended = ended
        self._max_running = max_running
        self._max_attempts = max_attempts
        self._processes = processes
        self._trainer = trainer
        self._works: dict[str, _Work] = {}
        self._changed = asyncio.Event()
        self._is_stopping = False
        self._endings: set[asyncio.Task[None]] = set()
        self._queue: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take up what an earlier server has left, then whatever comes."""
        await self._jobs.requeue_running()
        self._queue = asyncio.create_task(self._work_on_queue(), name="post-training jobs")

    async def stop(self) -> None:
        """Let every trainer save, for a moment, and end it; its job goes on with the next start."""
        self._is_stopping = True
        if self._queue is not None:
            self._queue.cancel()
        works = list(self._works.values())
        await asyncio.gather(*(_end(work, STOP_SECONDS) for work in works))
        for work in works:
            if work.task is not None and work.process is None:
                work.task.cancel()  # it writes rows, or waits
        tasks = [task for task in (self._queue, *self._endings, *(work.task for work in works)) if task is not None]
        if tasks:
            await asyncio.wait(tasks)

    def look(self) -> None:
        """There is something new in the queue."""
        self._changed.set()

    async def cancel(self, uuid: str) -> None:
        """End the trainer of a job that has ended in the store; returns at once, it may save for a while."""
        work = self._works.get(uuid)
        if work is not None and not work.is_cancelled:
            work.is_cancelled = True
            if work.process is None and work.task is not None:
                work.task.cancel()
            else:
                ending = asyncio.create_task(_end(work, CANCEL_SECONDS))
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)

    async def _work_on_queue(self) -> None:
        while True:
            self._changed.clear()
            try:
                waiting = await self._jobs.unfinished() if len(self._works) < self._max_running else []
            except StackError as error:
                logger.warning("the queue of jobs cannot be read: %s", error)
                await asyncio.sleep(_BUSY_SECONDS)
                continue
            for job in waiting:
                if len(self._works) < self._max_running and job.uuid not in self._works:
                    work = self._works[job.uuid] = _Work()
                    work.task = asyncio.create_task(self._work(job, work), name=f"job {job.uuid}")
            await self._changed.wait()

    async def _work(self, job: Job, work: _Work) -> None:
        folder = self._folder / job.folder_name
        try:
            await self._run(job, work, folder)
        except asyncio.CancelledError:
            if self._is_stopping:
                raise
        except Exception as error:
            reason = error.detail if isinstance(error, StackError) else "it met a fault of the server's; see its log"
            if not isinstance(error, StackError):
                logger.exception("job %r failed", job.uuid)
            await self._fail(job, folder, reason, error.code if isinstance(error, StackError) else "internal_error")
        finally:
            if not self._is_stopping:
                self._works.pop(job.uuid, None)
                self._changed.set()
        await self._insist(partial(self._ended, job.uuid))

    async def _run(self, job: Job, work: _Work, folder: Path) -> None:
        """Start the trainer until it has said its last word, or the job ends otherwise."""
        retry_seconds = _FIRST_RETRY_SECONDS
        while not self._is_stopping:
            await asyncio.to_thread(folder.mkdir, mode=0o700, parents=True, exist_ok=True)
            iters = await asyncio.to_thread(iterations_saved, folder)
            current = await self._insist(partial(self._jobs.begin, job.uuid, iters))
            if current is None:
                return
            if current.attempts > self._max_attempts:
                reason = (
                    f"it was started {self._max_attempts} times without a new checkpoint; the log says how it ended"
                )
                await self._fail(job, folder, reason, "no_progress")
                return
            try:
                await self._prepare(job, folder)
            except StackError as error:
                if not error.retriable:
                    raise
                await asyncio.to_thread(note, folder, f"its rows cannot be read for now: {error.detail}")
                await asyncio.sleep(_BUSY_SECONDS * 2**current.attempts)
                continue
            code = await self._attempt(job, work, folder)
            progress = await asyncio.to_thread(Progress(folder).refresh)
            last = progress.last
            if isinstance(last, Finished) and await asyncio.to_thread(result, folder) is not None:
                await self._publish(job)  # first: whoever reads that it is completed may ask the model
                await self._insist(partial(self._jobs.complete, job.uuid))
                return
            if isinstance(last, Failed):
                await self._insist(partial(self._jobs.fail, job.uuid, last.reason))
                return
            if work.is_cancelled or self._is_stopping:
                return
            if code == EXIT_BUSY:  # the trainer of a server that is about to end, or that shares the store
                await self._insist(partial(self._jobs.uncount, job.uuid))
                await asyncio.sleep(_BUSY_SECONDS)
                continue
            how = "was told to stop by somebody" if isinstance(last, Stopped) else _ending(code)
            logger.warning("the trainer of job %r %s; it is started again", job.uuid, how)
            await asyncio.to_thread(note, folder, f"the trainer {how}; it is started again")
            retry_seconds = _FIRST_RETRY_SECONDS if current.attempts == 1 else retry_seconds * 2
            await asyncio.sleep(min(retry_seconds, _LONGEST_RETRY_SECONDS))

    async def _attempt(self, job: Job, work: _Work, folder: Path) -> int:
        """Run the trainer once; its exit code."""
        await asyncio.to_thread(_write_plan, folder, job.plan)
        command = [sys.executable, "-m", launch.__name__, self._trainer, str(folder), str(self._processes)]
        log = await asyncio.to_thread((folder / _LOG_FILE).open, "wb")
        with log:
            work.process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=log,
                # Nothing is imported from wherever the server was started, also not by the processes of torchrun.
                env=os.environ | {"PYTHONSAFEPATH": "1"},
                start_new_session=True,  # a Ctrl-C in the terminal is for the server
            )
        process = work.process
        try:
            if work.is_cancelled or self._is_stopping:
                process.terminate()
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            work.process = None
            if process.stdin is not None:
                process.stdin.close()
            await asyncio.to_thread(_log_complaint, folder, job.uuid, process.returncode or 0)

    async def _fail(self, job: Job, folder: Path, reason: str, code: str) -> None:
        with suppress(OSError):  # a full disk, say: what matters is the row
            await asyncio.to_thread(append, folder, Failed(time=datetime.now(UTC), reason=reason, code=code))
        await self._insist(partial(self._jobs.fail, job.uuid, reason))

    async def _insist(self, change: Callable[[], Awaitable[T]]) -> T:
        """Make a change in the store, or elsewhere, as soon as it can be made."""
        seconds = _FIRST_RETRY_SECONDS
        while True:
            try:
                return await change()
            except StackError as error:
                if not error.retriable:
                    raise
                logger.warning("a job cannot go on for now: %s", error)
                await asyncio.sleep(seconds)
                seconds = min(2 * seconds, _LONGEST_RETRY_SECONDS)


async def _end(work: _Work, seconds: float) -> None:
    """Ask a trainer to save and end, and end it after that time."""
    process = work.process
    if process is None:
        return
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(seconds):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _write_plan(folder: Path, plan: str) -> None:
    incoming = folder / f"{PLAN_FILE}.incoming"
    incoming.write_text(plan, encoding="utf-8")
    incoming.replace(folder / PLAN_FILE)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    return f"was ended by signal {-code}{hint}"


def _log_complaint(folder: Path, uuid: str, code: int) -> None:
    """Tell the server's log what a trainer that ended badly left on its stderr."""
    if code in (0, EXIT_BUSY):
        return
    with suppress(OSError), (folder / _LOG_FILE).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
        if text := file.read().decode("utf-8", "replace").strip():
            logger.warning("the trainer of job %r ended with code %d and said: %s", uuid, code, text)

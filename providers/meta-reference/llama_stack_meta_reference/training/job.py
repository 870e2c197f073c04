"""A job in a process of its own: its lock, its signal, its events, and what becomes of an error."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from llama_stack.errors import InvalidRequestError, SetupError, StackError

from .plan import EXIT_BUSY, EXIT_DONE, EXIT_FAILED, LOCK_FILE, RESULT_FOLDER, Failed, Finished, TrainingPlan
from .progress import Progress

logger = logging.getLogger("llama_stack.meta_reference.training")


def run_job(job: Path) -> int:
    """Do the job whose plan is in the folder, as plan.py says; returns what the process should end with."""
    job = job.resolve()
    is_first = os.environ.get("RANK", "0") == "0"
    lock = os.open(job / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) if is_first else None
    try:
        if lock is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        logger.error("%s: another process works in it", job)
        return EXIT_BUSY
    stopping: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopping.append(number)

    # Before torch is imported, which takes seconds in which SIGTERM may come.
    previous = signal.signal(signal.SIGTERM, stop)
    progress = Progress(job, is_first=is_first)
    listeners = ExitStack()
    try:
        return _run(job, progress, stopping, listeners)
    except StackError as error:
        progress.tell(Failed, reason=str(error), code=error.code)
        return EXIT_FAILED
    except Exception as error:
        logger.exception("the training failed")
        progress.tell(Failed, reason=_reason(error), code="internal_error")
        return EXIT_FAILED
    finally:
        listeners.close()
        progress.close()
        signal.signal(signal.SIGTERM, previous)
        if lock is not None:
            os.close(lock)


def _run(job: Path, progress: Progress, stopping: list[int], listeners: ExitStack) -> int:
    try:
        plan = TrainingPlan.load(job)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequestError(f"plan.json: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except OSError as error:
        raise SetupError(f"plan.json cannot be read: {error.strerror}") from None
    from .loggers import loggers
    from .ranks import joined
    from .search import run_search
    from .trainer import Trainer, finished_result

    if progress.is_first:
        listeners.enter_context(loggers(plan.loggers, job, progress))
    iters = finished_result(job)
    if iters is not None:
        progress.tell(Finished, iters=iters, folder=RESULT_FOLDER)
        return EXIT_DONE
    with joined(plan.device) as ranks:
        if plan.search is None:
            Trainer(plan, job, progress, ranks).run(lambda: bool(stopping))
        else:
            run_search(plan, job, progress, ranks, lambda: bool(stopping))
    return EXIT_DONE


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror or error)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return f"out of memory: {str(error)[:300]}; a smaller micro_tokens or batch_size takes less"
    return f"{type(error).__name__}: {str(error)[:300]}"

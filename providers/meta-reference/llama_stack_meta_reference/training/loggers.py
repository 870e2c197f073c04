"""Where events go besides ``progress.jsonl``: files for TensorBoard, and a webhook. Neither holds a training up."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from llama_stack.errors import SetupError, StackError
from llama_stack.fetch import Fetcher

from .plan import TENSORBOARD_FOLDER, Event, LoggerSettings, Step, Validation
from .progress import Progress, Sink

logger = logging.getLogger("llama_stack.meta_reference.training")

_WAITING_EVENTS = 256
_TIMEOUT_SECONDS = 5.0
_MOST_BYTES = 64 * 1024
"""Of an answer, which nobody reads."""
_MOST_FAILURES = 3
"""In a row, after which nothing more is sent."""


@contextmanager
def loggers(settings: LoggerSettings, job: Path, progress: Progress) -> Iterator[None]:
    """Within it, events go to what the plan names too.

    Raises ``SetupError`` where TensorBoard is asked for and not installed.
    """
    with ExitStack() as stack:
        if settings.is_tensorboard:
            progress.sinks.append(stack.enter_context(_tensorboard(job / TENSORBOARD_FOLDER)))
        if settings.webhook_url is not None:
            progress.sinks.append(stack.enter_context(_webhook(settings.webhook_url)))
        yield


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Sink]:
    if find_spec("tensorboard") is None:
        raise SetupError("logger_config asks for TensorBoard, which is not installed: pip install tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def write(event: Event) -> None:
            if isinstance(event, Step | Validation):
                for name, value in event.model_dump(exclude={"time", "event", "iters"}, exclude_none=True).items():
                    writer.add_scalar(f"{event.event}/{name}", value, event.iters)

        yield write


@contextmanager
def _webhook(url: str) -> Iterator[Sink]:
    waiting: queue.Queue[Event | None] = queue.Queue(_WAITING_EVENTS)
    sender = threading.Thread(target=_send_all, args=(url, waiting), name="webhook", daemon=True)
    sender.start()

    def send(event: Event) -> None:
        if event.event != "step":
            try:
                waiting.put_nowait(event)
            except queue.Full:
                logger.warning("the webhook is too slow; an event is not sent")

    try:
        yield send
    finally:
        try:
            waiting.put_nowait(None)
        except queue.Full:
            return
        sender.join(_TIMEOUT_SECONDS)  # so that the last event gets out


def _send_all(url: str, waiting: queue.Queue[Event | None]) -> None:
    # The operator has allowed the host, an inner one too; a redirect is not followed to another.
    fetcher = Fetcher.of_service(url, is_private=True, max_bytes=_MOST_BYTES, timeout_seconds=_TIMEOUT_SECONDS)
    failures = 0
    while (event := waiting.get()) is not None:
        if failures == _MOST_FAILURES:
            continue
        body = event.model_dump_json(exclude_none=True).encode()
        try:
            status = asyncio.run(fetcher.ask(url, headers={}, body=body)).status
            failure = "" if status < 400 else f"it answered with {status}"
        except StackError as error:
            failure = error.detail
        failures = failures + 1 if failure else 0
        if failure:
            logger.warning("the webhook failed (%s of %s): %s", failures, _MOST_FAILURES, failure)

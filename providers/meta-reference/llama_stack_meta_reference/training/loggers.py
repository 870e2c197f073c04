"""Where events go besides ``progress.jsonl``: files for TensorBoard, and a webhook. Neither holds a training up."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from llama_stack.errors import SetupError

from .plan import TENSORBOARD_FOLDER, Event, LoggerSettings, Step, Validation
from .progress import Progress, Sink

logger = logging.getLogger("llama_stack.meta_reference.training")

_WAITING_EVENTS = 256
_TIMEOUT_SECONDS = 5.0
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
    import httpx2

    failures = 0
    # Neither proxies of the environment nor redirects: it is the host that was allowed, or none.
    with httpx2.Client(trust_env=False, follow_redirects=False, timeout=_TIMEOUT_SECONDS) as client:
        while (event := waiting.get()) is not None:
            if failures == _MOST_FAILURES:
                continue
            try:
                client.post(url, content=event.model_dump_json(exclude_none=True), headers=_HEADERS).raise_for_status()
                failures = 0
            except httpx2.HTTPError as error:
                failures += 1
                logger.warning("the webhook failed (%s of %s): %s", failures, _MOST_FAILURES, error)


_HEADERS = {"Content-Type": "application/json"}

"""Executes steps in processes of their own: one for a model, or one for each of its ranks.

A crash, a hang or an exhausted memory of the network then takes down a worker and never the server, and the server
imports no torch. The workers of a model live and die together: where one has ended, does not answer in time or answers
nonsense, all of them are killed, and ``reset`` starts new ones. They hold nothing that would need saving.

Each is started with one end of a socket pair that nobody else can reach (frames.py); what it does is in worker.py.
"""

from __future__ import annotations

import json
import logging
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from llama_stack.errors import SetupError, StackError

from ..config import ModelConfig
from .batch import Batch
from .drafting import GUESS
from .executor import ExecutorLostError, ModelFacts
from .frames import Connection, Frame, FrameError, Kind, PeerGoneError, pack_step, unpack_picked
from .sampler import Choice, SampledToken

logger = logging.getLogger("llama_stack.meta_reference.workers")

_MODULE = "llama_stack_meta_reference.inference.worker"
_EXIT_SECONDS = 1.0
"""How long a worker that closed its socket may take to end by itself, so that its exit code is its own."""
_KILLED_SECONDS = 30.0
"""How long the system may take to clear a killed process away."""
_ANSWERS = {
    Kind.OPEN: (Kind.FACTS, Kind.FACTS),
    Kind.LOAD: (Kind.DONE, Kind.DONE),
    Kind.STEP: (Kind.PICKED, Kind.DONE),
    Kind.RESET: (Kind.DONE, Kind.DONE),
    Kind.ADD_ADAPTER: (Kind.DONE, Kind.DONE),
    Kind.REMOVE_ADAPTER: (Kind.DONE, Kind.DONE),
}
"""What the first rank answers, and what the others do."""


class StepFailedError(Exception):
    """A worker could not do what it was asked to, and lives on; it has logged why."""


@dataclass(frozen=True)
class _Worker:
    """One process, and our end of its socket."""

    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection

    def ended(self) -> str:
        """How it ended, once its socket has been closed."""
        try:
            code = self.process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its socket"
        if code >= 0:
            return f"exited with code {code}"
        hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        return f"was ended by signal {-code}{hint}"


class Workers:
    """An ``Executor`` of one model in ``config.tensor_parallel`` processes.

    ``open`` starts them and looks at the checkpoint, ``load`` reads it; both raise what ``loading`` raises. ``close``
    may be called from another thread in the middle of either, which then raises ``ExecutorLostError``.
    """

    def __init__(self, name: str, config: ModelConfig) -> None:
        self.restarts = 0
        self._name = name
        self._config = config
        self._ranks = config.tensor_parallel
        self._facts: ModelFacts | None = None
        self._vocabulary = 0
        self._adapters: dict[int, str] = {}
        self._lost_adapters: set[int] = set()
        self._suspect = 0  # the adapter that was being read when a start failed
        self._workers: list[_Worker] = []
        self._poll = select.poll()
        self._rendezvous: tempfile.TemporaryDirectory[str] | None = None
        self._in_use = threading.Lock()  # whoever asks the workers something
        self._starting = threading.Lock()  # guards the list of workers and the flag
        self._is_closed = False
        # The system kills a worker when the thread that started it ends (worker.py asks for that), so that thread must
        # live as long as we do.
        self._starter = ThreadPoolExecutor(1, f"workers of {name}")

    @property
    def facts(self) -> ModelFacts:
        """What is known of the model; call ``open`` first."""
        assert self._facts is not None, "opened"
        return self._facts

    @property
    def block_tokens(self) -> int:
        """See ``Executor``."""
        return self.facts.block_tokens

    @property
    def lost_adapters(self) -> Collection[int]:
        """See ``Executor``."""
        return self._lost_adapters

    def open(self) -> ModelFacts:
        """Start the processes and let them plan; a small cache of one rank is the cache of all.

        Raises ``CheckpointError`` and ``SetupError`` as ``loading.open_model`` does, and ``SetupError`` when a process
        ends.
        """
        with self._in_use, self._as_setup():
            self._facts = self._start()
        return self._facts

    def load(self, vocabulary: int) -> Workers:
        """Read the weights, which may take long; return itself. Raises as ``open`` does."""
        with self._in_use, self._as_setup():
            self._vocabulary = vocabulary
            self._ask(Kind.LOAD, _json({"vocabulary": vocabulary}))
        return self

    def execute(self, batch: Batch, choices: Sequence[Choice]) -> list[SampledToken | None]:
        """See ``Executor``. A worker that does not answer within ``step_timeout_seconds`` is lost."""
        with self._in_use:
            lost = self._lost_adapters.intersection(batch.adapters)
            answer = self._ask(Kind.STEP, pack_step(_without(batch, lost), choices), self._config.step_timeout_seconds)
            try:
                guesses = [place for place, token in enumerate(batch.tokens) if token == GUESS]
                picked, guessed = unpack_picked(answer.body, len(choices), self._vocabulary, len(guesses))
            except FrameError as error:
                raise self._lost(self._workers[0], f"sent a broken frame: {error}") from error
            for place, token in zip(guesses, guessed, strict=True):
                batch.tokens[place] = token
            return _hidden(picked, batch, lost) if lost else picked

    def add_adapter(self, adapter: int, folder: str) -> None:
        """See ``Executor``. Raises ``SetupError`` too, when something else than the folder stands in the way."""
        with self._in_use:
            self._add_adapter(adapter, folder)
            self._adapters[adapter] = folder

    def remove_adapter(self, adapter: int) -> None:
        """See ``Executor``."""
        with self._in_use:
            self._adapters.pop(adapter, None)
            self._lost_adapters.discard(adapter)
            self._ask(Kind.REMOVE_ADAPTER, _json({"adapter": adapter}), self._config.step_timeout_seconds)

    def _add_adapter(self, adapter: int, folder: str) -> None:
        asked = _json({"adapter": adapter, "folder": folder})
        try:  # no step is run meanwhile, so it may take no longer than one
            self._ask(Kind.ADD_ADAPTER, asked, self._config.step_timeout_seconds)
        except StepFailedError as error:
            raise SetupError(str(error)) from error

    def check(self) -> None:
        """See ``Executor``."""
        with self._in_use:
            if not self._workers:
                raise ExecutorLostError(f"model {self._name!r} has no process")
            for worker, frame in self._arrived(0.0):
                raise self._lost(worker, f"sent {frame.kind.name} unasked")

    def reset(self) -> None:
        """See ``Executor``. Raises ``ExecutorLostError``, ``StackError`` or ``StepFailedError`` when that fails."""
        with self._in_use:
            if self._workers:
                try:
                    self._ask(Kind.RESET, timeout_seconds=self._config.step_timeout_seconds)
                except (StepFailedError, ExecutorLostError):
                    self._end()
                else:
                    return
            # The engine's books are made for this cache; a plan for less would not do. Nor would another type fit it.
            facts = self.facts
            cache_tokens = facts.blocks * facts.block_tokens
            self._start(facts.dtype, context_tokens=facts.context, cache_tokens=cache_tokens)
            self._ask(Kind.LOAD, _json({"vocabulary": self._vocabulary}))
            self._add_adapters_again()
            self.restarts += 1

    def _add_adapters_again(self) -> None:
        """Add all adapters to new processes; those that fail are lost, and the others are not to suffer for them."""
        passed_over, self._suspect = self._suspect, 0
        for adapter, folder in self._adapters.items():
            self._lost_adapters.add(adapter)
            if adapter == passed_over:
                logger.error("an adapter of model %r is lost: its process ended while it was read", self._name)
                continue
            self._suspect = adapter
            try:
                self._add_adapter(adapter, folder)
                self._lost_adapters.discard(adapter)
            except StackError as error:
                logger.error("an adapter of model %r is lost: %s", self._name, error)
            self._suspect = 0

    def interrupt(self) -> None:
        """See ``Executor``."""
        with self._starting:
            self._is_closed = True
            for worker in self._workers:
                worker.process.kill()

    def close(self) -> None:
        """See ``Executor``."""
        self.interrupt()
        with self._in_use:
            self._end()
        self._starter.shutdown()

    def _start(self, dtype: str | None = None, **settled: int) -> ModelFacts:
        """Start all processes and let each plan, with what is settled of the plan already."""
        ranks = self._ranks
        try:
            if ranks > 1:  # a folder that only its owner can enter
                self._rendezvous = tempfile.TemporaryDirectory(prefix="llama-stack-")
            self._starter.submit(self._start_processes, ranks).result()
        except OSError as error:  # the system is short of something; some of the processes may be there
            self._end()
            raise ExecutorLostError(f"model {self._name!r} gets no process: {error}") from error
        facts = self._open(dtype, settled)
        blocks, context = min(one.blocks for one in facts), min(one.context for one in facts)
        dtype = facts[0].dtype  # which may have been measured, and must be one for all
        if any((one.blocks, one.context, one.dtype) != (blocks, context, dtype) for one in facts):
            cache_tokens = blocks * facts[0].block_tokens
            facts = self._open(dtype, {"context_tokens": context, "cache_tokens": cache_tokens})
        return replace(
            facts[0],
            device=",".join(dict.fromkeys(one.device for one in facts)),
            weight_bytes=sum(one.weight_bytes for one in facts),
            cache_bytes=sum(one.cache_bytes for one in facts),
        )

    def _start_processes(self, count: int) -> None:
        with self._starting:
            if self._is_closed:
                raise ExecutorLostError(f"model {self._name!r} is being stopped")
            for rank in range(count):
                ours, theirs = socket.socketpair()
                with theirs, ExitStack() as unless_started:
                    unless_started.callback(ours.close)
                    process = subprocess.Popen(
                        # -P: nothing is imported from wherever the server was started.
                        [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno())],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        pass_fds=[theirs.fileno()],
                    )
                    unless_started.pop_all()
                self._workers.append(_Worker(rank, process, Connection(ours)))
                self._poll.register(ours, select.POLLIN)

    def _open(self, dtype: str | None, settled: Mapping[str, int]) -> list[ModelFacts]:
        """Let each process look at the checkpoint and plan."""
        asked: dict[str, Any] = {
            "name": self._name,
            "config": self._config.model_copy(update=settled).model_dump(),
            "dtype": dtype,
            "ranks": self._ranks,
            "rendezvous": self._rendezvous.name if self._rendezvous else None,
            "log_level": logger.getEffectiveLevel(),
        }
        bodies = [_json(asked | {"rank": rank}) for rank in range(self._ranks)]
        facts = []
        for worker, answer in zip(self._workers, self._answers(Kind.OPEN, bodies), strict=True):
            try:
                facts.append(_facts(answer))
            except (FrameError, TypeError) as error:
                raise self._lost(worker, f"sent a broken frame: {error}") from error
        return facts

    def _ask(self, kind: Kind, body: bytes = b"", timeout_seconds: float | None = None) -> Frame:
        """Ask all workers the same; return the answer of the first."""
        return self._answers(kind, [body] * self._ranks, timeout_seconds)[0]

    def _answers(self, kind: Kind, bodies: Sequence[bytes], timeout_seconds: float | None = None) -> list[Frame]:
        """Send each worker its body and wait for all answers, in the order of the ranks."""
        deadline = None if timeout_seconds is None else monotonic() + timeout_seconds
        if not self._workers:
            raise ExecutorLostError(f"model {self._name!r} has no process")
        for worker, body in zip(self._workers, bodies, strict=True):
            try:
                worker.connection.send(kind, body, timeout_seconds=timeout_seconds)
            except PeerGoneError as error:
                raise self._lost(worker, worker.ended()) from error
            except TimeoutError as error:
                raise self._lost(worker, f"took no work within {timeout_seconds:g} s") from error
        answers: dict[int, Frame] = {}
        failed: list[tuple[_Worker, Frame]] = []
        while len(answers) < len(self._workers):
            left = None if deadline is None else max(0.0, deadline - monotonic())
            arrived = self._arrived(left)
            if not arrived and left == 0.0:
                silent = next(worker for worker in self._workers if worker.rank not in answers)
                raise self._lost(silent, f"did not answer within {timeout_seconds:g} s")
            for worker, frame in arrived:
                if frame.kind is Kind.FAILED and kind is not Kind.ADD_ADAPTER:
                    raise self._failed(worker, frame, kind)
                if frame.kind is Kind.FAILED:
                    failed.append((worker, frame))
                elif frame.kind is not _ANSWERS[kind][worker.rank > 0] or worker.rank in answers:
                    raise self._lost(worker, f"answered {kind.name} with {frame.kind.name}")
                answers[worker.rank] = frame
        if failed:  # with an adapter no rank waits for another, so all of them have answered and go on
            raise self._failed(*failed[0], kind)
        return [answers[worker.rank] for worker in self._workers]

    def _arrived(self, timeout_seconds: float | None) -> list[tuple[_Worker, Frame]]:
        """What the workers have sent, but for log lines, which are logged; waits for something until the time is up."""
        ready = self._poll.poll(None if timeout_seconds is None else 1000 * timeout_seconds)
        found: list[tuple[_Worker, Frame]] = []
        for descriptor, _ in ready:
            worker = next(worker for worker in self._workers if worker.connection.fileno() == descriptor)
            try:
                for frame in worker.connection.arrived():
                    if frame.kind is Kind.LOG:
                        _log(frame)
                    else:
                        found.append((worker, frame))
            except PeerGoneError as error:
                raise self._lost(worker, worker.ended()) from error
            except FrameError as error:
                raise self._lost(worker, f"sent a broken frame: {error}") from error
        return found

    def _failed(self, worker: _Worker, frame: Frame, asked: Kind) -> Exception:
        """What to raise for a failure that a worker reports. All are ended, unless one that is alone failed a step."""
        try:
            code, detail = frame.json()["code"], str(frame.json()["detail"])
        except (FrameError, KeyError) as error:
            return self._lost(worker, f"sent a broken frame: {error}")
        is_harmless = asked is Kind.ADD_ADAPTER
        if code is None and (is_harmless or (asked in (Kind.STEP, Kind.RESET) and self._ranks == 1)):
            return StepFailedError(f"{self._called(worker)} failed: {detail}")
        if code is None:  # the other ranks may wait for this one for ever
            return self._lost(worker, f"failed: {detail}")
        if not is_harmless:
            self._end()
        return StackError.revive(str(code), detail)

    def _lost(self, worker: _Worker, what: str) -> ExecutorLostError:
        """End all workers, for one that is lost."""
        self._end()
        return ExecutorLostError(f"{self._called(worker)} {what}")

    def _called(self, worker: _Worker) -> str:
        if self._ranks == 1:
            return f"the process of model {self._name!r}"
        return f"rank {worker.rank} of {self._ranks} of model {self._name!r}"

    def _end(self) -> None:
        with self._starting:
            workers, self._workers = self._workers, []
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            self._poll.unregister(worker.connection)
            worker.connection.close()
            try:
                worker.process.wait(_KILLED_SECONDS)
            except subprocess.TimeoutExpired:
                logger.error("%s cannot be ended: it is killed and the system still holds it", self._called(worker))
        if self._rendezvous is not None:
            self._rendezvous.cleanup()
            self._rendezvous = None

    @contextmanager
    def _as_setup(self) -> Iterator[None]:
        try:
            yield
        except ExecutorLostError as error:
            raise SetupError(f"model {self._name!r} could not be loaded: {error}") from error


def _without(batch: Batch, adapters: set[int]) -> Batch:
    if not adapters:
        return batch
    return replace(batch, adapters=[0 if adapter in adapters else adapter for adapter in batch.adapters])


def _hidden(picked: list[SampledToken | None], batch: Batch, adapters: set[int]) -> list[SampledToken | None]:
    """The picked tokens without those of sequences that should have run through one of ``adapters``."""
    of_row = [adapter for adapter, count in zip(batch.adapters, batch.counts, strict=True) for _ in range(count)]
    rows = zip(batch.sampled, picked, strict=True)
    return [None if of_row[row] in adapters else token for row, token in rows]


def _facts(frame: Frame) -> ModelFacts:
    values = frame.json()
    return ModelFacts(**values | {"eos_ids": tuple(values["eos_ids"])})


def _log(frame: Frame) -> None:
    """Write a worker's line into the server's log, under the name of the worker's logger."""
    line = frame.json()
    name, level, message = line.get("logger"), line.get("level"), line.get("message")
    if not (isinstance(name, str) and isinstance(level, int) and isinstance(message, str)):
        raise FrameError("a log line that is none")
    logging.getLogger(name).log(level, "%s", message)


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()

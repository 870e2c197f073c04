"""The loop that owns one model: requests come in through a bounded line and leave as streams of tokens.

One thread calls the executor and nothing else does. Each turn of the loop frees the blocks of whoever cancelled, plans
a step for all (``scheduler``), has it executed (``executor``) and hands the picked tokens to the event loops that wait
for them, once a step. With nothing to do it sleeps.

A step that fails takes down the requests in flight, with ``EngineRestartedError``, and nobody else: the cache is
blanked, for what a broken step left in it could reach other sequences, and the loop goes on. Where the executor itself
is lost it is started again, as often as it takes; who waits in line keeps waiting, unless that fails again and again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from time import monotonic

from llama_stack.apis.common import SamplingParams, StopReason
from llama_stack.errors import DrainingError, EngineRestartedError, OverloadedError, StackError

from .drafting import Drafter, NetworkGuesses, PromptLookup
from .executor import Executor, ExecutorLostError
from .kv_cache import BlockPool, blocks_for
from .metrics import EngineMetrics
from .sampler import SampledToken, Sampler
from .scheduler import NOT_FINITE, End, Scheduler, Sequence, Step

logger = logging.getLogger("llama_stack.meta_reference.engine")

_PATIENCE = 5
"""After so many failed tries to reset the executor those in line are sent away, and whoever comes is refused."""
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 30.0
"""Between two tries; twice as long each time."""
_IDLE_SECONDS = 1.0
"""How often an engine with nothing to do looks whether its executor is still there."""
_STOP_SECONDS = 2.0
"""How long a step may go on when the engine is stopped, before it is cut off where that can be done."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What is asked of the engine: continue ``prompt``, which leaves room for at least one token in the context."""

    prompt: list[int]
    sampling: SamplingParams
    max_tokens: int = 0
    """The most tokens to generate; 0 = to the end of the context."""
    logprobs: bool = False
    adapter: int = 0
    """What ``Engine.add_adapter`` returned; 0 for the base model alone."""


class Ticket:
    """One generation under way: an async iterator over its tokens, without the one that ended it.

    After the last token ``stop_reason`` says why it ended. Iterating raises ``StackError`` when the engine failed.
    ``cancel`` frees its place before the next step; whoever holds a ticket calls it when done, however that came.
    """

    __slots__ = ("_arrived", "_cancel", "_sequence", "_waiter", "loop", "stop_reason")

    def __init__(self, sequence: Sequence, loop: asyncio.AbstractEventLoop, cancel: Callable[[Sequence], None]) -> None:
        self.stop_reason: StopReason = StopReason.NOT_STOPPED
        self.loop = loop
        self._sequence = sequence
        self._cancel = cancel
        # Both are made when needed: a batch has thousands of tickets, made in one go by the event loop.
        self._arrived: deque[SampledToken | StopReason | StackError] | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> SampledToken:
        if self.stop_reason is not StopReason.NOT_STOPPED:
            raise StopAsyncIteration
        while not self._arrived:
            self._waiter = self.loop.create_future()
            await self._waiter
        item = self._arrived[0] if isinstance(self._arrived[0], StackError) else self._arrived.popleft()
        if isinstance(item, StackError):
            raise item
        if isinstance(item, StopReason):
            self.stop_reason = item
            raise StopAsyncIteration
        return item

    def cancel(self) -> None:
        """Stop the generation; may be called from any thread, and more than once."""
        self._cancel(self._sequence)

    def arrive(self, item: SampledToken | StopReason | StackError) -> None:
        """Take what the engine made; called in the ticket's own event loop."""
        if self._arrived is None:
            self._arrived = deque()
        self._arrived.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Engine:
    """Runs generations on one model, many at a time. ``start`` it once; ``stop`` ends its thread and the executor.

    ``blocks`` says how many blocks the executor's cache has; they hold at least one ``context``. ``stop_ids`` end a
    generation. ``lookup_tokens`` bounds what is guessed from the text itself, ``draft_tokens`` what the executor's
    draft network guesses, which is 0 where there is none.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        blocks: int,
        context: int,
        stop_ids: frozenset[int],
        max_sequences: int = 32,
        queue_size: int = 256,
        prefill_tokens: int = 512,
        lookup_tokens: int = 0,
        draft_tokens: int = 0,
        prefix_reuse: bool = True,
        name: str = "model",
    ) -> None:
        if blocks < blocks_for(context, executor.block_tokens):
            raise ValueError(f"{blocks} blocks of {executor.block_tokens} tokens do not hold a context of {context}")
        self.context = context
        self.name = name
        self.steps = 0
        """How many steps have been run, counting those that failed."""
        self._executor = executor
        self._lookup_tokens, self._draft_tokens = lookup_tokens, draft_tokens
        self._stop_ids = stop_ids
        self._pool = BlockPool(blocks, executor.block_tokens)
        self._scheduler = Scheduler(
            self._pool,
            max_sequences=max_sequences,
            queue_size=queue_size,
            prefill_tokens=prefill_tokens,
            draft_tokens=max(lookup_tokens, draft_tokens),
            prefix_reuse=prefix_reuse,
        )
        self._tickets: dict[Sequence, Ticket] = {}
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, SampledToken | StopReason | StackError]]] = {}
        self._lock = threading.Condition()  # guards the scheduler, the tickets and the flags below
        self._has_cancelled = False
        self._is_stopping = False
        self._calls: list[tuple[Callable[[], None], Future[None]]] = []  # to be made between two steps
        self._last_adapter = 0
        self._retired: set[int] = set()
        self._is_clean = True  # whether the executor and its cache can be used
        self._failed_resets = 0  # in a row
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)

    @property
    def is_running(self) -> bool:
        """Whether the engine takes requests."""
        return self._thread.is_alive() and not self._is_stopping

    @property
    def trouble(self) -> str | None:
        """Why requests make no progress now; None when all is well."""
        if self._is_clean:
            return None
        tries = f"; {self._failed_resets} tries have failed, see the server's log" if self._failed_resets else ""
        return f"model {self.name!r} is being restarted{tries}"

    @property
    def restarts(self) -> int:
        """How often the executor was lost and came up again."""
        return self._executor.restarts

    @property
    def running(self) -> int:
        """How many sequences hold cache blocks."""
        with self._lock:
            return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """How many requests wait for a place."""
        with self._lock:
            return self._scheduler.waiting

    @property
    def blocks(self) -> int:
        """How many blocks the cache has."""
        return self._pool.blocks

    @property
    def free_blocks(self) -> int:
        """How many of them no sequence holds; some of these may still serve those that begin alike."""
        with self._lock:
            return self._pool.free

    def metrics(self) -> EngineMetrics:
        """What has been counted since the start, and how things stand."""
        with self._lock:
            return replace(
                self._scheduler.metrics.copy(),
                running=len(self._scheduler.running),
                waiting=self._scheduler.waiting,
                cache_blocks=self._pool.blocks,
                used_blocks=self._pool.blocks - self._pool.free,
                reusable_blocks=self._pool.cached,
                restarts=self.restarts,
            )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def stop(self) -> None:
        """Finish the step that runs, fail what is under way with ``DrainingError``, end the thread, free the memory.

        A step that goes on for more than two seconds is cut off, unless it runs in this process.
        """
        with self._lock:
            self._is_stopping = True
            self._lock.notify()
        await asyncio.to_thread(self._close)

    async def add_adapter(self, folder: str) -> int:
        """Read a LoRA adapter between two steps; return the number by which generations ask for it.

        Raises ``CheckpointError`` for a bad folder, ``EngineRestartedError`` when the executor was lost meanwhile or
        cannot be restarted, and ``DrainingError`` when the engine stops.
        """
        self._last_adapter += 1
        adapter = self._last_adapter  # never used again: what is cached of another's text must not match
        try:
            await self._between_steps(lambda: self._executor.add_adapter(adapter, folder))
        except BaseException:  # the caller may have left while it was read, or one rank may hold it
            self.retire_adapter(adapter)
            raise
        return adapter

    def retire_adapter(self, adapter: int) -> None:
        """Let go of an adapter as soon as the last generation that runs through it has ended."""
        with self._lock:
            self._retired.add(adapter)
            self._lock.notify()

    async def _between_steps(self, call: Callable[[], None]) -> None:
        done: Future[None] = Future()
        with self._lock:
            if not self.is_running:
                raise DrainingError(f"the engine of {self.name!r} has been stopped")
            self._refuse_if_down()
            self._calls.append((call, done))
            self._lock.notify()
        await asyncio.wrap_future(done)

    def submit(self, request: list[Generation]) -> list[Ticket]:
        """Put one request, of one generation or a batch of them, in line; return a ticket for each generation.

        Called in the event loop that will iterate the tickets; never blocks. Raises ``OverloadedError`` when the line
        is full, ``DrainingError`` when the engine has been stopped, ``EngineRestartedError`` while it cannot be
        restarted.
        """
        loop = asyncio.get_running_loop()
        sequences = [self._sequence(generation) for generation in request]
        with self._lock:
            if not self.is_running:
                raise DrainingError(f"the engine of {self.name!r} has been stopped")
            self._refuse_if_down()
            if self._has_cancelled:
                self._scheduler.clear_line()
            if self._scheduler.is_full:
                raise OverloadedError(
                    f"model {self.name!r} has its queue full ({self._scheduler.waiting} waiting); "
                    "try again in a moment",
                    retry_after_seconds=2,
                )
            tickets = [Ticket(sequence, loop, self._cancel) for sequence in sequences]
            self._tickets.update(zip(sequences, tickets, strict=True))
            self._scheduler.add(sequences)
            self._lock.notify()
        return tickets

    def _refuse_if_down(self) -> None:
        if self._failed_resets >= _PATIENCE:
            raise EngineRestartedError(
                f"the engine of {self.name!r} could not be restarted yet; it is being tried",
                retry_after_seconds=int(_LONGEST_PAUSE_SECONDS),
            )

    def _sequence(self, generation: Generation) -> Sequence:
        prompt_tokens = len(generation.prompt)
        room = self.context - prompt_tokens
        assert 0 < prompt_tokens < self.context, "the caller refuses prompts that do not fit"
        sampler = Sampler(generation.sampling)
        return Sequence(
            tokens=list(generation.prompt),
            limit=prompt_tokens + min(generation.max_tokens or room, room),
            sampler=sampler,
            stop_ids=self._stop_ids,
            submitted_at=monotonic(),
            wants_logprobs=generation.logprobs,
            adapter=generation.adapter,
            drafter=self._drafter() if sampler.is_greedy else None,
        )

    def _drafter(self) -> Drafter | None:
        lookup = PromptLookup(self._lookup_tokens) if self._lookup_tokens else None
        return NetworkGuesses(self._draft_tokens, lookup) if self._draft_tokens else lookup

    def _cancel(self, sequence: Sequence) -> None:
        with self._lock:
            if sequence in self._tickets:
                sequence.is_cancelled = self._has_cancelled = True

    def _close(self) -> None:
        if self._thread.ident is not None:
            self._thread.join(_STOP_SECONDS)
            self._executor.interrupt()
            self._thread.join()
        self._executor.close()

    def _run(self) -> None:
        while self._wait():
            try:
                self._turn()
            except Exception as error:  # whatever it was, the next request must find an engine
                self._recover(error)
            self._deliver()
        with self._lock:
            stopped = [*self._scheduler.running, *self._scheduler.drop_waiting()]
            for sequence in stopped:
                self._end(sequence, DrainingError(f"the engine of {self.name!r} is being stopped"))
        self._refuse_calls(DrainingError(f"the engine of {self.name!r} is being stopped"))
        self._deliver()

    def _wait(self) -> bool:
        """Sleep while there is nothing to do, or until the next try to reset is due; return whether to go on."""
        with self._lock:
            if self._failed_resets:
                pause_seconds = min(_FIRST_PAUSE_SECONDS * 2 ** (self._failed_resets - 1), _LONGEST_PAUSE_SECONDS)
                self._lock.wait_for(lambda: self._is_stopping, pause_seconds)
            elif self._is_clean and self._scheduler.is_idle and not (self._is_stopping or self._calls):
                self._lock.wait(_IDLE_SECONDS)
            return not self._is_stopping

    def _turn(self) -> None:
        if not self._is_clean:
            self._executor.reset()
            self._is_clean = True
            self._failed_resets = 0
        self._executor.check()  # nobody shall be in a step that cannot be run
        self._tend_adapters()
        with self._lock:
            if self._has_cancelled:
                self._has_cancelled = False
                self._scheduler.drop_cancelled()
                self._tickets = {s: ticket for s, ticket in self._tickets.items() if not s.is_cancelled}
            step = self._scheduler.plan()
        if not step.parts:
            return
        self.steps += 1
        began = monotonic()
        rows = [part.sequence for part in step.parts for _ in range(part.sampled)]
        choices = [sequence.sampler.choose(wants_logprobs=sequence.wants_logprobs) for sequence in rows]
        try:
            picked = self._executor.execute(step.batch, choices)
        except Exception:
            with self._lock:
                self._scheduler.metrics.failed_steps += 1
            raise
        with self._lock:
            self._settle(step, picked, began)

    def _tend_adapters(self) -> None:
        with self._lock:
            calls, self._calls = self._calls, []
        lost: ExecutorLostError | None = None
        for call, done in calls:
            if not done.set_running_or_notify_cancel():
                continue
            try:
                call()
            except ExecutorLostError as error:
                lost = lost or error
                done.set_exception(EngineRestartedError(f"the engine of {self.name!r} is being restarted"))
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)
        if lost is not None:
            raise lost  # now, for nobody has been admitted to the step yet
        with self._lock:
            in_use = {sequence.adapter for sequence in self._tickets} if self._retired else set()
            free = self._retired - in_use
        for adapter in free:
            self._executor.remove_adapter(adapter)
            with self._lock:
                self._retired.discard(adapter)

    def _refuse_calls(self, error: StackError) -> None:
        with self._lock:
            calls, self._calls = self._calls, []
        for _, done in calls:
            if done.set_running_or_notify_cancel():
                done.set_exception(error)

    def _settle(self, step: Step, picked: list[SampledToken | None], began: float) -> None:
        """Enter the picked tokens, count them and pass them on. Under the lock."""
        metrics, now, row = self._scheduler.metrics, monotonic(), 0
        step.take_guesses()
        metrics.step_seconds.observe(now - began)
        metrics.step_sequences.observe(len(step.parts))
        for part in step.parts:
            sequence = part.sequence
            rows, row = picked[row : row + part.sampled], row + part.sampled
            length = len(sequence.tokens)
            if not sequence.is_begun:
                sequence.is_begun = True
                metrics.prompt_tokens += length
                metrics.queue_seconds.observe(began - sequence.submitted_at)
            end = self._scheduler.settle(part, [NOT_FINITE if token is None else token.token for token in rows])
            gained = len(sequence.tokens) - length
            if gained:
                metrics.generated_tokens += gained
                if sequence.answered_at:
                    metrics.inter_token_seconds.observe((now - sequence.answered_at) / gained, gained)
                else:
                    metrics.first_token_seconds.observe(now - sequence.submitted_at)
                sequence.answered_at = now
            for token in rows[:gained]:
                assert token is not None
                self._post(sequence, token)
            if end is not None:
                self._end(sequence, self._last_word(end, sequence.adapter))

    def _last_word(self, end: End, adapter: int) -> StopReason | StackError:
        if end is End.NOT_FINITE and adapter in self._executor.lost_adapters:
            return EngineRestartedError(
                f"the adapter was lost when the engine of {self.name!r} was restarted; the log says why"
            )
        if end is End.NOT_FINITE:
            logger.error("the network of %r gave logits that are not finite", self.name)
            return EngineRestartedError(f"the network of {self.name!r} gave no finite logits")
        return StopReason.FINISHED_OK if end is End.STOP_TOKEN else StopReason.MAX_TOKENS

    def _end(self, sequence: Sequence, last: StopReason | StackError) -> None:
        """Post the last item of a sequence, running or waiting, and forget it. Under the lock."""
        if sequence in self._scheduler.running:
            self._scheduler.finish(sequence)
        self._post(sequence, last)
        self._tickets.pop(sequence, None)

    def _post(self, sequence: Sequence, item: SampledToken | StopReason | StackError) -> None:
        ticket = self._tickets.get(sequence)
        if ticket is not None and not sequence.is_cancelled:
            self._outbox.setdefault(ticket.loop, []).append((ticket, item))

    def _recover(self, error: Exception) -> None:
        """Fail what was in flight and have the executor reset; where that fails too often, fail all that wait."""
        trace = None if isinstance(error, ExecutorLostError | StackError) else error
        if self._is_clean:
            logger.error("%s; requests in flight fail, and the engine of %r goes on", error, self.name, exc_info=trace)
        else:
            logger.error("the engine of %r could not be reset: %s", self.name, error, exc_info=trace)
        with self._lock:
            failed = list(self._scheduler.running)
            if not self._is_clean:
                self._failed_resets += 1
                if self._failed_resets >= _PATIENCE:
                    failed += self._scheduler.drop_waiting()
            self._is_clean = False
            for sequence in failed:
                self._end(sequence, EngineRestartedError(f"a step of the engine of {self.name!r} failed"))
            self._pool.clear()
        if self._failed_resets >= _PATIENCE:
            self._refuse_calls(EngineRestartedError(f"the engine of {self.name!r} could not be restarted yet"))

    def _deliver(self) -> None:
        """Hand each event loop what this step made for it, in one call."""
        outbox, self._outbox = self._outbox, {}
        for loop, items in outbox.items():
            try:
                loop.call_soon_threadsafe(_hand_over, items)
            except RuntimeError:  # the loop was closed: nobody is left to read
                for ticket, _ in items:
                    ticket.cancel()


def _hand_over(items: list[tuple[Ticket, SampledToken | StopReason | StackError]]) -> None:
    for ticket, item in items:
        ticket.arrive(item)

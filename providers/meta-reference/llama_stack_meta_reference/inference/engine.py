"""The loop that owns one model: requests come in through a bounded line and leave as streams of tokens.

One thread runs the network and nothing else touches it. Each turn of the loop frees the slots of whoever cancelled,
admits who is next, runs one step for all (``scheduler``), picks the tokens (``sampler``) and hands them to the event
loops that wait for them, once a step. With nothing to do it sleeps.

A step that fails takes down the requests in flight, with ``EngineRestartedError``, and nobody else: the cache is made
anew, for what a broken step left in it could reach other sequences, and the loop goes on.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llama_stack.apis.common import SamplingParams, StopReason
from llama_stack.errors import DrainingError, EngineRestartedError, OverloadedError, StackError

from ..llama.model import Llama
from .kv_cache import KVCache
from .sampler import SampledToken, Sampler, sample
from .scheduler import Scheduler, Sequence, Step

logger = logging.getLogger("llama_stack.meta_reference.engine")


@dataclass(frozen=True, slots=True)
class Generation:
    """What is asked of the engine: continue ``prompt``, which leaves room for at least one token in the context."""

    prompt: list[int]
    sampling: SamplingParams
    max_tokens: int = 0
    """The most tokens to generate; 0 = to the end of the context."""
    logprobs: bool = False


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
    """Runs generations on one model, many at a time. ``start`` it once; ``stop`` ends its thread.

    The cache is taken when the engine is made. ``stop_ids`` end a generation; tokens from ``vocabulary`` on, which a
    padded network has and its tokenizer has not, are never picked.
    """

    def __init__(
        self,
        model: Llama,
        *,
        context: int,
        max_sequences: int,
        stop_ids: frozenset[int],
        vocabulary: int | None = None,
        queue_size: int = 256,
        prefill_tokens: int = 512,
        name: str = "model",
    ) -> None:
        self.context = context
        self.name = name
        self.steps = 0
        """How many steps have been run, counting those that failed."""
        self._model: Llama | None = model
        self._vocabulary = vocabulary or model.config.vocab_size
        self._stop_ids = stop_ids
        weight = model.tok_embeddings.weight
        self._device = weight.device
        self._new_cache = partial(
            KVCache, model.config, slots=max_sequences, context=context, device=weight.device, dtype=weight.dtype
        )
        self._cache: KVCache | None = self._new_cache()
        self._scheduler = Scheduler(slots=max_sequences, queue_size=queue_size, prefill_tokens=prefill_tokens)
        self._tickets: dict[Sequence, Ticket] = {}
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, SampledToken | StopReason | StackError]]] = {}
        self._lock = threading.Condition()  # guards the scheduler, the tickets and the flags below
        self._has_cancelled = False
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)

    @property
    def is_running(self) -> bool:
        """Whether the engine takes requests."""
        return self._thread.is_alive() and not self._is_stopping

    @property
    def running(self) -> int:
        """How many sequences hold a cache slot."""
        with self._lock:
            return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        with self._lock:
            return self._scheduler.waiting

    @property
    def free_slots(self) -> int:
        """How many more sequences could run at once."""
        with self._lock:
            return self._cache.free if self._cache else self._scheduler.slots

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def stop(self) -> None:
        """Finish the step that runs, fail what is under way with ``DrainingError``, end the thread, free the memory."""
        with self._lock:
            self._is_stopping = True
            self._lock.notify()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)
        self._model = self._cache = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def submit(self, request: list[Generation]) -> list[Ticket]:
        """Put one request, of one generation or a batch of them, in line; return a ticket for each generation.

        Called in the event loop that will iterate the tickets; never blocks. Raises ``OverloadedError`` when the line
        is full, ``DrainingError`` when the engine has been stopped.
        """
        loop = asyncio.get_running_loop()
        sequences = [self._sequence(generation) for generation in request]
        with self._lock:
            if not self.is_running:
                raise DrainingError(f"the engine of {self.name!r} has been stopped")
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

    def _sequence(self, generation: Generation) -> Sequence:
        room = self.context - len(generation.prompt)
        assert 0 < len(generation.prompt) < self.context, "the caller refuses prompts that do not fit"
        return Sequence(
            prompt=generation.prompt,
            limit=min(generation.max_tokens or room, room),
            sampler=Sampler(generation.sampling),
            wants_logprobs=generation.logprobs,
        )

    def _cancel(self, sequence: Sequence) -> None:
        with self._lock:
            if sequence in self._tickets:
                sequence.is_cancelled = self._has_cancelled = True

    def _run(self) -> None:
        while True:
            with self._lock:
                while self._scheduler.is_idle and not self._is_stopping:
                    self._lock.wait()
                if self._is_stopping:
                    break
            try:
                self._turn()
            except Exception:  # whatever it was, the next request must find an engine
                logger.exception("a step of %r failed; the requests in flight fail and the engine goes on", self.name)
                self._recover()
            self._deliver()
        with self._lock:
            stopped = [*self._scheduler.running, *self._scheduler.drop_waiting()]
            for sequence in stopped:
                self._end(sequence, DrainingError(f"the engine of {self.name!r} is being stopped"))
        self._deliver()

    def _turn(self) -> None:
        if self._cache is None:
            self._cache = self._new_cache()
        with self._lock:
            dropped: list[Sequence] = []
            if self._has_cancelled:
                self._has_cancelled = False
                dropped = self._scheduler.drop_cancelled()
                self._tickets = {s: ticket for s, ticket in self._tickets.items() if not s.is_cancelled}
        self._release(dropped)
        with self._lock:
            self._scheduler.admit(self._cache.free, self._cache.allocate)
            step = self._scheduler.plan()
        if not step.prefill and not step.decode:
            return
        self.steps += 1
        with torch.inference_mode():
            logits_RV = self._forward(step, self._cache)
            sampled = step.sampled
            for sequence, count in step.prefill:
                sequence.read += count
            if logits_RV is None:
                return
            picked = sample(logits_RV, [s.sampler for s in sampled], [s.wants_logprobs for s in sampled])
        with self._lock:
            ended = [s for s, token in zip(sampled, picked, strict=True) if self._take(s, token)]
        self._release(ended)

    def _release(self, sequences: Iterable[Sequence]) -> None:
        """Free the slots of sequences that run no more. Not under the lock: blanking a large slot takes a while."""
        assert self._cache is not None
        for sequence in sequences:
            self._cache.release(sequence.slot)

    def _forward(self, step: Step, cache: KVCache) -> Tensor | None:
        """Run the step's tokens through the network; return (R, V) logits for ``step.sampled``."""
        assert self._model is not None
        hidden: list[Tensor] = []
        if step.prefill:
            chunks = [torch.tensor(s.prompt[s.read : s.read + count]) for s, count in step.prefill]
            counts = [count for _, count in step.prefill]
            tokens_BT = pad_sequence(chunks, batch_first=True).to(self._device)
            with cache.step([sequence.slot for sequence, _ in step.prefill], counts) as view:
                hidden_BTD = self._model.hidden(tokens_BT, view)
            finishing = [
                (row, count - 1) for row, (s, count) in enumerate(step.prefill) if s.read + count == len(s.prompt)
            ]
            if finishing:
                row_R, last_R = torch.tensor(finishing, device=self._device).T
                hidden.append(hidden_BTD[row_R, last_R])
        if step.decode:
            tokens_BT = torch.tensor([[sequence.last_token] for sequence in step.decode], device=self._device)
            with cache.step([sequence.slot for sequence in step.decode], [1] * len(step.decode)) as view:
                hidden.append(self._model.hidden(tokens_BT, view)[:, 0])
        if not hidden:
            return None
        return self._model.logits(torch.cat(hidden))[:, : self._vocabulary]

    def _take(self, sequence: Sequence, picked: SampledToken | None) -> bool:
        """Pass a token on; return whether the sequence has ended. Under the lock."""
        if picked is None:
            logger.error("the network of %r gave logits that are not finite", self.name)
            self._end(sequence, EngineRestartedError(f"the network of {self.name!r} gave no finite logits"))
            return True
        if picked.token in self._stop_ids:
            self._end(sequence, StopReason.FINISHED_OK)
            return True
        sequence.generated += 1
        sequence.last_token = picked.token
        self._post(sequence, picked)
        if sequence.generated == sequence.limit:
            self._end(sequence, StopReason.MAX_TOKENS)
            return True
        return False

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

    def _recover(self) -> None:
        """Fail what was in flight and drop the cache; where not even a cache could be made, fail all that wait too."""
        with self._lock:
            failed = list(self._scheduler.running)
            if self._cache is None:
                failed += self._scheduler.drop_waiting()
            self._cache = None
            for sequence in failed:
                self._end(sequence, EngineRestartedError(f"a step of the engine of {self.name!r} failed"))

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

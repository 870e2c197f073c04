"""The loop that owns the model: what it promises to requests that come, stay, leave and break."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import torch
from llama_stack_meta_reference.inference import engine as engine_module
from llama_stack_meta_reference.inference.engine import Engine, Generation, Ticket
from llama_stack_meta_reference.llama.config import LlamaConfig
from llama_stack_meta_reference.llama.model import Block, CacheView, Llama
from torch import Tensor

from llama_stack.apis.common import SamplingParams, SamplingStrategy, StopReason
from llama_stack.errors import DrainingError, EngineRestartedError, OverloadedError
from tests.providers.meta_reference.lookup import FIRST, byte_tokenizer, lookup_llama, new_engine, writing
from tests.providers.meta_reference.small_llama import SMALL

pytestmark = pytest.mark.anyio

GREEDY = SamplingParams()
NEWLINE = [ord("\n")]


class GatedLlama(Llama):
    """Waits for a permit before each forward pass, breaks when told to, and counts its passes."""

    def __init__(self, config: LlamaConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.permits = threading.Semaphore(0)
        self.is_open = False
        self.passes = 0
        self.entered = threading.Event()
        self.fault: Exception | None = None
        self.poisoned_token = -1

    def hidden(
        self, tokens: Tensor, cache: CacheView | None = None, run_block: Callable[..., Tensor] = Block.__call__
    ) -> Tensor:
        self.passes += 1
        self.entered.set()
        if not self.is_open:
            assert self.permits.acquire(timeout=30)
        fault, self.fault = self.fault, None
        hidden_D = super().hidden(tokens, cache, run_block)
        if fault is not None:
            raise fault
        return hidden_D.masked_fill((tokens == self.poisoned_token)[..., None], torch.nan)

    async def until_entered(self) -> None:
        """Wait until a pass has begun since the last call."""
        assert await asyncio.to_thread(self.entered.wait, 30)
        self.entered.clear()


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def endless(network: type[Llama] = Llama) -> Llama:
    """Answers a newline with the letters a, b, a, b, ... and never ends."""
    a, b = ord("a"), ord("b")
    return lookup_llama({ord("\n"): a, a: b, b: a}, byte_tokenizer().vocab_size, network=network)


def gated(*, max_sequences: int, queue_size: int = 256) -> tuple[GatedLlama, Engine]:
    model = endless(GatedLlama)
    assert isinstance(model, GatedLlama)
    return model, new_engine(model, byte_tokenizer(), max_sequences=max_sequences, queue_size=queue_size)


def one(prompt: list[int], max_tokens: int = 0, sampling: SamplingParams = GREEDY) -> list[Generation]:
    return [Generation(prompt, sampling, max_tokens)]


async def tokens(ticket: Ticket) -> list[int]:
    return [sampled.token async for sampled in ticket]


async def test_a_generation_ends_at_the_models_end_of_turn() -> None:
    """The stop token is the engine's affair: it is not handed on, and the reason says that the model ended."""
    tokenizer, model = writing([b"one", b"two"])
    async with running(new_engine(model, tokenizer)) as engine:
        (ticket,) = engine.submit(one(NEWLINE))
        assert await tokens(ticket) == [FIRST, FIRST + 1]
        assert ticket.stop_reason is StopReason.FINISHED_OK
        assert await tokens(ticket) == []


@pytest.mark.parametrize(("max_tokens", "expected"), [(1, 1), (7, 7), (0, 53), (60, 53), (53, 53)])
async def test_max_tokens_bounds_the_answer_and_zero_means_to_the_end_of_the_context(
    max_tokens: int, expected: int
) -> None:
    """Prompt and answer fill the context exactly; one token too many would be a write past the cache."""
    async with running(new_engine(endless(), byte_tokenizer(), context=64)) as engine:
        (ticket,) = engine.submit(one([1] * 10 + NEWLINE, max_tokens))
        assert len(await tokens(ticket)) == expected
        assert ticket.stop_reason is StopReason.MAX_TOKENS
        assert engine.free_blocks == engine.blocks


@pytest.mark.parametrize("prefill_tokens", [3, 512])
async def test_greedy_tokens_are_those_of_full_passes_without_a_cache(small_model: Llama, prefill_tokens: int) -> None:
    """The plainest way to generate, run whole for each token, is what all of the engine's machinery must equal."""
    prompt = [7, 3, 250, 11, 11, 90, 8]
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(64):
            text.append(int(small_model(torch.tensor([text]))[0, -1].argmax()))
    tokenizer = byte_tokenizer()
    async with running(new_engine(small_model, tokenizer, prefill_tokens=prefill_tokens)) as engine:
        assert await tokens(engine.submit(one(prompt, max_tokens=64))[0]) == text[len(prompt) :]


@pytest.mark.parametrize("lookup_tokens", [0, 8])
async def test_answers_in_a_crowd_equal_answers_alone(small_model: Llama, lookup_tokens: int) -> None:
    """Continuous batching, chunked prompts and other people's sampling may change the speed and nothing else.

    Every prompt runs alone on one engine, and all at once on another with few places, tiny chunks, and a cache so small
    that some give way to others.
    """
    draw = random.Random(5)
    requests = [
        Generation(
            [draw.randrange(SMALL.vocab_size) for _ in range(draw.randint(1, 60))],
            GREEDY
            if index % 3
            else SamplingParams(strategy=SamplingStrategy.TOP_P, temperature=1.0, top_p=0.9, seed=index),
            max_tokens=draw.randint(1, 40),
        )
        for index in range(24)
    ]
    tokenizer = byte_tokenizer()

    slow = new_engine(small_model, tokenizer, max_sequences=1)
    quick = new_engine(small_model, tokenizer, max_sequences=5, prefill_tokens=7, lookup_tokens=lookup_tokens, blocks=9)
    async with running(slow) as calm, running(quick) as busy:
        alone = [await tokens(calm.submit([request])[0]) for request in requests]
        singles = [busy.submit([request])[0] for request in requests[:12]]
        batch = busy.submit(requests[12:])
        crowd = await asyncio.gather(*map(tokens, [*singles, *batch]))
        assert busy.free_blocks == busy.blocks
        assert busy._scheduler.metrics.preemptions
    assert crowd == alone
    assert len({tuple(answer) for answer in alone}) > 12


async def test_a_cancelled_generation_frees_its_blocks_before_the_next_step() -> None:
    """Work for a client that left is work taken from the others: not one more pass may be spent on it."""
    model, engine = gated(max_sequences=1)
    async with running(engine):
        (ticket,) = engine.submit(one(NEWLINE))
        (next_in_line,) = engine.submit(one(NEWLINE, max_tokens=1))
        for _ in range(5):
            await model.until_entered()
            model.permits.release()
            await anext(ticket)
        await model.until_entered()  # the sixth pass is under way
        ticket.cancel()
        ticket.cancel()
        model.permits.release(2)
        assert await tokens(next_in_line) == [ord("a")]
        assert model.passes == 7
        assert engine.free_blocks == engine.blocks


async def test_a_waiting_generation_can_be_cancelled() -> None:
    """It must neither run later nor keep its place in the line."""
    model, engine = gated(max_sequences=1, queue_size=1)
    async with running(engine):
        (first,) = engine.submit(one(NEWLINE, max_tokens=2))
        await model.until_entered()
        (waiting,) = engine.submit(one(NEWLINE))
        with pytest.raises(OverloadedError):
            engine.submit(one(NEWLINE))
        waiting.cancel()
        model.permits.release()
        await anext(first)
        (third,) = engine.submit(one(NEWLINE, max_tokens=1))
        model.is_open = True
        model.permits.release()
        await asyncio.gather(tokens(first), tokens(third))
        assert model.passes == 3


async def test_storms_of_disconnects_leave_every_block_free() -> None:
    """1,000 clients that leave anywhere, in the line, the prompt or the answer: the cache is at its baseline.

    Prompts begin alike, tokens are guessed, and the cache is so small that some sequences give way to others.
    """
    draw = random.Random(3)
    engine = new_engine(endless(), byte_tokenizer(), blocks=16, max_sequences=6, prefill_tokens=16, lookup_tokens=4)
    async with running(engine):

        async def client() -> None:
            (ticket,) = engine.submit(one([1] * draw.randint(0, 60) + NEWLINE))
            try:
                for _ in range(draw.choice((0, 0, 1, 2, 5, 30))):
                    await anext(ticket)
            finally:
                ticket.cancel()

        for _ in range(20):
            await asyncio.gather(*(client() for _ in range(50)))
        (last,) = engine.submit(one(NEWLINE, max_tokens=3))
        assert await tokens(last) == [ord("a"), ord("b"), ord("a")]
        assert engine.free_blocks == engine.blocks
        assert engine.running == engine.waiting == 0
        assert not engine._tickets
        assert engine._scheduler.metrics.reused_tokens
        assert engine._scheduler.metrics.accepted_tokens


async def test_a_full_line_is_refused_with_a_time_to_come_back() -> None:
    """A bounded queue is what keeps latency and memory bounded; the client must see it, typed, at once."""
    model, engine = gated(max_sequences=2, queue_size=3)
    async with running(engine):
        tickets = [engine.submit(one(NEWLINE, max_tokens=1))[0] for _ in range(5)]
        with pytest.raises(OverloadedError) as refused:
            engine.submit(one(NEWLINE))
        assert refused.value.status == 503
        assert refused.value.retry_after_seconds
        model.is_open = True
        model.permits.release()
        assert await asyncio.gather(*map(tokens, tickets)) == [[ord("a")]] * 5
        assert await tokens(engine.submit(one(NEWLINE, max_tokens=1))[0]) == [ord("a")]


async def test_a_step_that_raises_fails_those_in_flight_and_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    """The engine is not the process: after a fault the next in line is served, from a cache that is clean."""
    model, engine = gated(max_sequences=2)
    model.is_open = True
    model.fault = RuntimeError("CUDA error: secret")
    async with running(engine):
        tickets = [engine.submit(one(NEWLINE, max_tokens=3))[0] for _ in range(6)]
        answers = await asyncio.gather(*map(tokens, tickets), return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, EngineRestartedError)]
        assert 1 <= len(failed) <= 2  # the first step may begin before the second request is in
        assert answers.count([ord("a"), ord("b"), ord("a")]) == 6 - len(failed)
        assert engine.free_blocks == engine.blocks
    assert failed[0].status == 503
    assert "secret" not in failed[0].detail
    assert "secret" in caplog.text


async def test_under_random_faults_every_client_learns_how_it_ended(caplog: pytest.LogCaptureFixture) -> None:
    """Of 400 generations, one pass in ten breaks: each gets all its tokens or the typed error, and none hangs."""
    draw = random.Random(9)
    model, engine = gated(max_sequences=3)
    model.is_open = True
    hidden = model.hidden

    def breaking(tokens: Tensor, cache: CacheView | None = None) -> Tensor:
        if draw.random() < 0.1:
            model.fault = RuntimeError("broken")
        return hidden(tokens, cache)

    model.hidden = breaking  # type: ignore[method-assign, assignment]
    caplog.set_level(logging.CRITICAL + 1)

    async def client() -> str:
        (ticket,) = engine.submit(one([1] * draw.randint(0, 9) + NEWLINE, max_tokens=4))
        try:
            assert await tokens(ticket) == [ord("a"), ord("b"), ord("a"), ord("b")]
        except EngineRestartedError:
            return "broken"
        return "answered"

    async with running(engine):
        ends = [end for _ in range(20) for end in await asyncio.gather(*(client() for _ in range(20)))]
        assert len(ends) == 400
        assert set(ends) == {"answered", "broken"}
        assert engine.free_blocks == engine.blocks
        assert engine.running == engine.waiting == 0


async def test_logits_that_are_not_finite_fail_their_own_sequence_alone(caplog: pytest.LogCaptureFixture) -> None:
    """A NaN is an error with a name, never a token; and what it left in the cache reaches nobody."""
    model, engine = gated(max_sequences=2)
    model.is_open = True
    model.poisoned_token = ord("b")
    caplog.set_level(logging.CRITICAL)
    async with running(engine):
        (healthy,) = engine.submit(one([ord("x")], max_tokens=40))
        (poisoned,) = engine.submit(one(NEWLINE, max_tokens=40))
        assert (await anext(poisoned)).token == ord("a")
        assert (await anext(poisoned)).token == ord("b")
        with pytest.raises(EngineRestartedError):
            await anext(poisoned)
        with pytest.raises(EngineRestartedError):
            await anext(poisoned)
        assert len(await tokens(healthy)) == 40
        assert engine.free_blocks == engine.blocks


@pytest.fixture
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(engine_module, "_LONGEST_PAUSE_SECONDS", 0.001)


@pytest.mark.usefixtures("_without_pauses")
@pytest.mark.parametrize("failures", [1, 4, 5, 7])
async def test_a_cache_that_cannot_be_blanked_is_tried_again_and_fails_who_waits_after_five_tries(
    failures: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device may take a moment to recover, so those in line are kept; but not for ever, and others are told at once.

    Then the engine goes on by itself, without a request that would wake it.
    """
    model, engine = gated(max_sequences=1)
    reset, attempts, troubles = engine._executor.reset, 0, list[str | None]()
    refused = list[EngineRestartedError]()

    def reset_at_last() -> None:
        nonlocal attempts
        attempts += 1
        troubles.append(engine.trouble)
        if attempts == 6:
            loop.call_soon_threadsafe(come)
            assert came.wait(30)
        if attempts <= failures:
            raise torch.OutOfMemoryError("no memory")
        reset()

    def come() -> None:
        try:
            engine.submit(one(NEWLINE, max_tokens=1))
        except EngineRestartedError as error:
            refused.append(error)
        came.set()

    loop, came = asyncio.get_running_loop(), threading.Event()
    monkeypatch.setattr(engine._executor, "reset", reset_at_last)
    model.fault = RuntimeError("broken")
    async with running(engine):
        tickets = [engine.submit(one(NEWLINE, max_tokens=1))[0] for _ in range(3)]
        await model.until_entered()
        model.is_open = True
        model.permits.release()
        answers = await asyncio.gather(*map(tokens, tickets), return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, EngineRestartedError)]
        assert len(failed) == (1 if failures < 5 else 3)
        assert answers.count([ord("a")]) == 3 - len(failed)
        while engine.trouble is not None:
            await asyncio.sleep(0.001)
        assert attempts == failures + 1
        assert troubles[0] == "model 'model' is being restarted"
        assert troubles[1:] == [
            f"model 'model' is being restarted; {count} tries have failed, see the server's log"
            for count in range(1, failures + 1)
        ]
        assert len(refused) == (failures >= 5)
        assert await tokens(engine.submit(one(NEWLINE, max_tokens=1))[0]) == [ord("a")]
        assert engine.free_blocks == engine.blocks
        assert engine.metrics().failed_steps == 1


async def test_stopping_ends_the_thread_and_tells_everyone() -> None:
    """Neither a running nor a waiting client may hang, and no thread may outlive its engine."""
    model, engine = gated(max_sequences=1)
    engine.start()
    (running_one,), (waiting_one,) = engine.submit(one(NEWLINE)), engine.submit(one(NEWLINE))
    await model.until_entered()
    stopping = asyncio.create_task(engine.stop())
    await asyncio.sleep(0)
    with pytest.raises(DrainingError):
        engine.submit(one(NEWLINE))
    model.permits.release()
    await stopping
    for ticket in (running_one, waiting_one):
        with pytest.raises(DrainingError):
            await tokens(ticket)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine")]
    assert not engine.is_running
    await engine.stop()


async def test_an_idle_engine_sleeps() -> None:
    """A server that nobody asks anything must not keep a core busy: its thread may use 5 ms in 200 ms of idling."""
    async with running(new_engine(endless(), byte_tokenizer())) as engine:
        await tokens(engine.submit(one(NEWLINE, max_tokens=3))[0])
        (thread,) = (thread for thread in threading.enumerate() if thread.name.startswith("engine"))
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        before = time.clock_gettime(clock)
        await asyncio.sleep(0.2)
        assert time.clock_gettime(clock) - before < 0.005


async def test_a_loop_that_was_closed_does_not_stop_the_engine() -> None:
    """A client in a thread of its own may end its event loop with answers under way."""
    model, engine = gated(max_sequences=1)

    async def leave() -> None:
        engine.submit(one(NEWLINE))
        await model.until_entered()

    async with running(engine):
        await asyncio.to_thread(asyncio.run, leave())
        model.is_open = True
        model.permits.release()
        assert await tokens(engine.submit(one(NEWLINE, max_tokens=2))[0]) == [ord("a"), ord("b")]
        assert engine.free_blocks == engine.blocks


async def test_guessed_tokens_come_with_the_log_probabilities_of_picked_ones() -> None:
    """A client that asks for scores gets one for every token, the same whether the token was guessed before or not."""
    request = [Generation(NEWLINE, GREEDY, max_tokens=30, logprobs=True)]
    answers = []
    for lookup_tokens in (0, 8):
        engine = new_engine(endless(), byte_tokenizer(), lookup_tokens=lookup_tokens)
        async with running(engine):
            answers.append([sampled async for sampled in engine.submit(request)[0]])
            assert engine.steps == 30 if not lookup_tokens else engine.steps < 15
    plain, guessed = answers
    assert [sampled.token for sampled in plain] == [sampled.token for sampled in guessed]
    assert all(sampled.logprob is not None and len(sampled.alternatives) == 5 for sampled in guessed)
    assert [sampled.logprob for sampled in guessed] == pytest.approx([sampled.logprob for sampled in plain], abs=1e-5)


async def test_a_seed_gives_the_same_tokens_where_others_are_guessed_for() -> None:
    """Sampled answers are not guessed: each guess would use up random numbers of the seed."""
    seeded = SamplingParams(strategy=SamplingStrategy.TOP_P, temperature=5.0, top_p=1.0, seed=3)
    answers = []
    for lookup_tokens in (0, 8):
        async with running(new_engine(endless(), byte_tokenizer(), lookup_tokens=lookup_tokens)) as engine:
            (greedy,), (sampled,) = engine.submit(one(NEWLINE, 40)), engine.submit(one(NEWLINE, 40, seeded))
            answers.append(await asyncio.gather(tokens(greedy), tokens(sampled)))
    assert answers[0] == answers[1]


async def test_padding_of_the_vocabulary_is_never_picked() -> None:
    """Networks are padded beyond their tokenizer; such a row has no text and was never trained."""
    tokenizer = byte_tokenizer()
    model = lookup_llama({ord("\n"): tokenizer.vocab_size + 3}, tokenizer.vocab_size + 8)
    async with running(new_engine(model, tokenizer)) as engine:
        picked = await tokens(engine.submit(one(NEWLINE, max_tokens=5))[0])
        assert all(token < tokenizer.vocab_size for token in picked)

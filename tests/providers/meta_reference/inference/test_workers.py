"""Models in processes of their own: the same answers, and whatever becomes of such a process, the server lives on."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from llama_stack_meta_reference.config import MetaReferenceConfig, ModelConfig
from llama_stack_meta_reference.inference.batch import Batch
from llama_stack_meta_reference.inference.engine import Engine, Generation, Ticket
from llama_stack_meta_reference.inference.executor import ExecutorLostError
from llama_stack_meta_reference.inference.loading import open_model
from llama_stack_meta_reference.inference.provider import MetaReferenceInference, serve
from llama_stack_meta_reference.inference.sampler import Choice, SampledToken
from llama_stack_meta_reference.inference.workers import Workers

from llama_stack.apis.common import SamplingParams, SamplingStrategy
from llama_stack.errors import CheckpointError, EngineRestartedError, SetupError
from tests.providers.meta_reference.small_llama import WORDED

pytestmark = pytest.mark.anyio

KILLS = int(os.environ.get("LLAMA_STACK_KILLS", "3"))
"""How often a process is killed at a random moment; ``make kills`` has 50."""
PROMPT = [11, 42, 7, 7, 300, 5]
SEEDED = SamplingParams(strategy=SamplingStrategy.TOP_P, temperature=1.0, seed=3)


def config(folder: Path, **settings: object) -> ModelConfig:
    return ModelConfig.model_validate({"checkpoint": str(folder), "device": "cpu", "max_sequences": 4} | settings)


@asynccontextmanager
async def serving(folder: Path, **settings: object) -> AsyncIterator[tuple[MetaReferenceInference, Engine, Workers]]:
    """A provider whose model ``m`` runs in a process of its own."""
    async with serve(MetaReferenceConfig(models={"m": config(folder, **settings)})) as provider:
        engine = provider._models["m"].engine
        workers = engine._executor
        assert isinstance(workers, Workers)
        yield provider, engine, workers


def pid(workers: Workers) -> int:
    return workers._workers[0].process.pid


def is_alive(process: int) -> bool:
    """Whether there is such a process that has not ended yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def tokens(ticket: Ticket) -> list[int]:
    return [sampled.token async for sampled in ticket]


async def until_restarted(engine: Engine, restarts: int) -> None:
    async with asyncio.timeout(120):
        while engine.restarts < restarts or engine.trouble is not None:
            await asyncio.sleep(0.01)


def test_a_model_in_its_own_process_picks_the_tokens_that_it_picks_in_ours(worded_checkpoint: Path) -> None:
    """With scores, at random with the same chance, in chunks, and after a reset."""
    shared = open_model("m", config(worded_checkpoint)).load(WORDED.vocab_size)
    workers = Workers("m", config(worded_checkpoint))
    try:
        facts = workers.open()
        assert facts == open_model("m", config(worded_checkpoint)).facts
        workers.load(WORDED.vocab_size)
        steps: list[tuple[Batch, list[Choice]]] = [
            (Batch(PROMPT, [0], [6], [[0]], [5]), [Choice(wants_logprobs=True)]),
            (Batch([9, 1, 2], [6, 0], [1, 2], [[0], [1]], [0, 2]), [Choice(False, True, 0.8, 0, 0.9, 0.7), Choice()]),
            (Batch([3], [7], [1], [[0]], []), []),
        ]
        answers = list[list[list[SampledToken | None]]]()
        for _ in range(2):
            answers.append([workers.execute(batch, choices) for batch, choices in steps])
            assert [shared.execute(batch, choices) for batch, choices in steps] == answers[-1]
            workers.reset()
            shared.reset()
        assert answers[0] == answers[1]
        assert workers.restarts == 0
    finally:
        workers.close()
        shared.close()


async def test_a_process_that_dies_fails_what_it_ran_and_nothing_else(
    worded_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those in line are served by the next one, which comes by itself, and the operator can see all of it."""
    async with serving(worded_checkpoint, max_sequences=1) as (provider, engine, workers):
        (ticket,) = engine.submit([Generation(PROMPT, SEEDED, 40)])
        expected = await tokens(ticket)
        process = pid(workers)
        os.kill(process, signal.SIGSTOP)  # so that the first request is under way and the second in line
        (first,) = engine.submit([Generation(PROMPT, SEEDED, 40)])
        while not engine.running:
            await asyncio.sleep(0.001)
        (second,) = engine.submit([Generation(PROMPT, SEEDED, 40)])
        os.kill(process, signal.SIGKILL)
        with pytest.raises(EngineRestartedError) as failure:
            await tokens(first)
        assert failure.value.retriable
        assert await tokens(second) == expected
        assert engine.free_blocks == engine.blocks
        assert provider.unready_reason() is None
        assert (await provider.models())[0].metadata["restarts"] == engine.metrics().restarts == 1
        assert "the process of model 'm' was ended by signal 9" in caplog.text
        process = pid(workers)
    assert not is_alive(process)


async def test_kills_at_any_moment_leave_whole_answers_or_errors(worded_checkpoint: Path) -> None:
    """Never a wrong token, never a block that stays taken, and ready again by itself each time."""
    chance = random.Random(0)
    async with serving(worded_checkpoint, max_sequences=3) as (_, engine, workers):
        expected = await tokens(engine.submit([Generation(PROMPT, SEEDED, 40)])[0])
        failed = 0
        for kill in range(1, KILLS + 1):
            tickets = [engine.submit([Generation(PROMPT, SEEDED, 40)])[0] for _ in range(6)]
            answers = asyncio.gather(*map(tokens, tickets), return_exceptions=True)
            await asyncio.sleep(chance.random() * 0.03)
            os.kill(pid(workers), signal.SIGKILL)
            await until_restarted(engine, kill)
            for answer in await answers:
                if isinstance(answer, EngineRestartedError):
                    failed += 1
                else:
                    assert answer == expected
            assert engine.free_blocks == engine.blocks
        assert 0 < failed <= 3 * KILLS


async def test_a_process_that_hangs_is_ended_after_its_time(
    worded_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stopped process stands for a device that does not come back: its socket is open and nothing arrives."""
    async with serving(worded_checkpoint, step_timeout_seconds=0.5) as (_, engine, workers):
        process = pid(workers)
        os.kill(process, signal.SIGSTOP)
        (ticket,) = engine.submit([Generation(PROMPT, SamplingParams(), 3)])
        with pytest.raises(EngineRestartedError):
            await tokens(ticket)
        await until_restarted(engine, 1)
        assert not is_alive(process)
        assert "did not answer within 0.5 s" in caplog.text
        assert len(await tokens(engine.submit([Generation(PROMPT, SamplingParams(), 3)])[0])) == 3


async def test_a_process_that_dies_while_nobody_asks_is_back_before_somebody_does(worded_checkpoint: Path) -> None:
    """The next request shall not pay for it, and readiness says meanwhile that something is amiss."""
    async with serving(worded_checkpoint) as (provider, engine, workers):
        os.kill(pid(workers), signal.SIGKILL)
        async with asyncio.timeout(60):
            while provider.unready_reason() is None:
                await asyncio.sleep(0.001)
        assert provider.unready_reason() == "model 'm' is being restarted"
        await until_restarted(engine, 1)
        assert len(await tokens(engine.submit([Generation(PROMPT, SamplingParams(), 3)])[0])) == 3


async def test_a_process_that_cannot_come_back_is_tried_until_it_can(
    worded_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint is moved away and back: the reason is in the log, and no restart of the server is needed."""
    async with serving(worded_checkpoint) as (provider, engine, workers):
        away = worded_checkpoint.with_name("away")
        shutil.move(worded_checkpoint, away)
        os.kill(pid(workers), signal.SIGKILL)
        async with asyncio.timeout(60):
            while "1 tries have failed" not in (provider.unready_reason() or ""):
                await asyncio.sleep(0.01)
        assert "could not be reset" in caplog.text
        assert str(worded_checkpoint) in caplog.text
        shutil.move(away, worded_checkpoint)
        await until_restarted(engine, 1)
        assert len(await tokens(engine.submit([Generation(PROMPT, SamplingParams(), 3)])[0])) == 3


def test_ranks_that_could_not_all_be_started_are_started_anew(
    worded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of them are nothing that could be reset; and of those that were started none stays."""
    started = list[subprocess.Popen[bytes]]()
    real = subprocess.Popen

    def scarce(*arguments: Any, **settings: Any) -> subprocess.Popen[bytes]:
        if started:
            raise OSError(errno.EMFILE, "Too many open files")
        started.append(real(*arguments, **settings))
        return started[0]

    workers = Workers("m", config(worded_checkpoint, tensor_parallel=2))
    try:
        workers.open()
        workers.load(WORDED.vocab_size)
        os.kill(pid(workers), signal.SIGKILL)
        with monkeypatch.context() as short:
            short.setattr(subprocess, "Popen", scarce)
            with pytest.raises(ExecutorLostError, match="Too many open files"):
                workers.reset()
        assert not is_alive(started[0].pid)
        workers.reset()
        assert workers.restarts == 1
        assert len(workers.execute(Batch(PROMPT, [0], [6], [[0]], [5]), [Choice()])) == 1
    finally:
        workers.close()


async def test_a_process_that_hangs_while_it_reads_an_adapter_is_ended_after_its_time(
    worded_checkpoint: Path, tmp_path: Path
) -> None:
    """No step is run meanwhile: whoever waits would wait for ever. And whoever came meanwhile is served."""
    async with serving(worded_checkpoint, step_timeout_seconds=0.5) as (_, engine, workers):
        os.kill(pid(workers), signal.SIGSTOP)
        async with asyncio.timeout(60):
            adding = asyncio.create_task(engine.add_adapter(str(tmp_path)))
            await asyncio.sleep(0)
            (ticket,) = engine.submit([Generation(PROMPT, SamplingParams(), 3)])
            with pytest.raises(EngineRestartedError):
                await adding
            assert len(await tokens(ticket)) == 3
        await until_restarted(engine, 1)


def test_what_a_process_refuses_is_refused_as_here(small_checkpoint: Path, tmp_path: Path) -> None:
    """The same class with the same words, so that an operator need not know where a model runs."""
    for folder, settings, kind in (
        (tmp_path / "nowhere", {}, CheckpointError),
        (small_checkpoint, {"context_tokens": 4096}, SetupError),
    ):
        asked = config(folder, **settings)
        with pytest.raises(kind) as here:
            open_model("m", asked)
        workers = Workers("m", asked)
        try:
            with pytest.raises(kind) as there:
                workers.open()
        finally:
            workers.close()
        assert str(there.value) == str(here.value)


@pytest.mark.parametrize("moment", ["open", "load"])
def test_a_load_that_is_given_up_ends_its_process(worded_checkpoint: Path, moment: str) -> None:
    """Ctrl-C while 70 billion weights are read must not leave them in memory."""
    workers = Workers("m", config(worded_checkpoint))
    if moment == "load":
        workers.open()
    loading = threading.Thread(target=_quietly, args=(workers, moment))
    loading.start()
    while not workers._workers:
        time.sleep(0.001)
    process = pid(workers)
    workers.close()
    loading.join(30)
    assert not loading.is_alive()
    assert not is_alive(process)
    with pytest.raises(ExecutorLostError):
        workers.check()


def _quietly(workers: Workers, moment: str) -> None:
    try:
        if moment == "open":
            workers.open()
        else:
            workers.load(WORDED.vocab_size)
    except SetupError:
        pass


def test_the_server_needs_no_torch_and_its_processes_end_with_it(worded_checkpoint: Path) -> None:
    """The network's libraries are the worker's affair; and a server that is killed leaves none of them running."""
    code = (
        "import asyncio, sys, time\n"
        "from llama_stack_meta_reference.config import MetaReferenceConfig\n"
        "from llama_stack_meta_reference.inference.provider import serve\n"
        "async def main():\n"
        f"    models = {{'m': {{'checkpoint': {str(worded_checkpoint)!r}, 'device': 'cpu'}}}}\n"
        "    async with serve(MetaReferenceConfig.model_validate({'models': models})) as provider:\n"
        "        process = provider._models['m'].engine._executor._workers[0].process.pid\n"
        "        print(process, [name for name in ('torch', 'numpy') if name in sys.modules], flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        process, _, imported = server.stdout.readline().partition(" ")
        assert imported.strip() == "[]"
        assert is_alive(int(process))
    finally:
        server.kill()
        server.communicate()
    deadline = time.monotonic() + 30
    while is_alive(int(process)):
        assert time.monotonic() < deadline
        time.sleep(0.01)

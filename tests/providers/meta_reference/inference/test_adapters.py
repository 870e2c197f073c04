"""Adapters served on one base: each sequence has its own, all in one step, and they come and go while others answer."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_stack_meta_reference.config import MetaReferenceConfig
from llama_stack_meta_reference.inference import engine as engine_module
from llama_stack_meta_reference.inference.batch import Batch
from llama_stack_meta_reference.inference.engine import Engine
from llama_stack_meta_reference.inference.executor import ExecutorLostError
from llama_stack_meta_reference.inference.native_runner import NativeRunner
from llama_stack_meta_reference.inference.provider import MetaReferenceInference, serve
from llama_stack_meta_reference.inference.runner import Runner, TorchRunner
from llama_stack_meta_reference.inference.sampler import Choice
from llama_stack_meta_reference.inference.workers import Workers
from llama_stack_meta_reference.llama.checkpoint import load_model, open_checkpoint
from llama_stack_meta_reference.llama.lora import load_adapter
from llama_stack_meta_reference.llama.quantize import KINDS as QUANTIZED
from llama_stack_meta_reference.llama.quantize import RoundedLinear
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llama_stack.apis.common import SamplingParams
from llama_stack.apis.inference import (
    AddAdapterRequest,
    BatchCompletionRequest,
    CompletionRequest,
    CompletionResponse,
    RemoveAdapterRequest,
)
from llama_stack.errors import (
    AlreadyExistsError,
    CheckpointError,
    ConflictError,
    EngineRestartedError,
    ForbiddenError,
    InvalidRequestError,
    ModelNotFoundError,
)
from tests.providers.meta_reference import checkpoints, small_tokenizer
from tests.providers.meta_reference.adapters import tuned
from tests.providers.meta_reference.kernels import NEEDS_KERNELS

pytestmark = pytest.mark.anyio

VOCABULARY = 856
PROMPTS = [[5, 9, 700, 3, 11], [5, 9, 700, 3], [8, 8], [5, 9, 700, 3, 11, 2]]
ADAPTERS = [1, 0, 2, 1]


def reference() -> LlamaForCausalLM:
    return checkpoints.random_reference(vocabulary=VOCABULARY, kv_heads=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` with a tokenizer, and two adapters: one on every matrix, one on a few."""
    root = tmp_path_factory.mktemp("adapted")
    checkpoints.write_hugging_face(reference(), root / "base")
    small_tokenizer.write_hugging_face(root / "base")
    tuned(reference(), root / "every", seed=1, r=5, lora_alpha=20)
    tuned(reference(), root / "few", seed=2, r=20, target_modules=["v_proj", "down_proj"], use_rslora=True)
    return root


@pytest.fixture(scope="module")
def expected(folders: Path) -> list[Tensor]:
    """By peft: for each of PROMPTS the logits after it, through its own adapter."""
    models: list[Any] = [
        reference(),
        tuned(reference(), folders / "every", seed=1, r=5, lora_alpha=20),
        tuned(reference(), folders / "few", seed=2, r=20, target_modules=["v_proj", "down_proj"], use_rslora=True),
    ]
    with torch.no_grad():
        return [
            models[adapter](torch.tensor([prompt])).logits[0, -1]
            for prompt, adapter in zip(PROMPTS, ADAPTERS, strict=True)
        ]


def runner_of(kind: str, folder: Path) -> Runner:
    model = load_model(open_checkpoint(folder), device="cpu", dtype=torch.float32)
    if kind == "plain":
        return TorchRunner(model, blocks=8)
    return NativeRunner(model, kind="float32", blocks=8, context=128)


@pytest.mark.parametrize("kind", ["plain", pytest.param("compiled", marks=NEEDS_KERNELS)])
def test_one_step_runs_each_sequence_through_its_own_adapter_as_peft_does(
    folders: Path, expected: list[Tensor], kind: str
) -> None:
    """Prompts in one piece or token by token, side by side with the bare base; and the base is itself again after."""
    runner = runner_of(kind, folders / "base")
    for number, name in ((1, "every"), (2, "few")):
        runner.add_adapter(number, load_adapter(folders / name, runner.config))
    counts = [len(prompt) for prompt in PROMPTS]
    last = [sum(counts[: place + 1]) - 1 for place in range(len(counts))]
    batch = Batch([t for p in PROMPTS for t in p], [0] * 4, counts, [[0], [1], [2], [3]], last, ADAPTERS)
    whole_RV = runner.run(batch).clone()
    for found_V, expected_V in zip(whole_RV, expected, strict=True):
        assert torch.allclose(found_V[:VOCABULARY], expected_V, atol=1e-4)
    for place in range(max(counts)):
        some = [row for row in range(4) if place < counts[row]]
        found_RV = runner.run(
            Batch(
                [PROMPTS[row][place] for row in some],
                [place] * len(some),
                [1] * len(some),
                [[4 + row] for row in some],
                list(range(len(some))),
                [ADAPTERS[row] for row in some],
            )
        )
        for row, found_V in zip(some, found_RV, strict=True):
            if place == counts[row] - 1:
                assert torch.allclose(found_V[:VOCABULARY], expected[row], atol=1e-4)
    base_V = runner.run(Batch(PROMPTS[0], [0], [5], [[0]], [4]))[0, :VOCABULARY].clone()
    assert not torch.allclose(base_V, expected[0], atol=0.1)
    runner.remove_adapter(1)
    few_V = runner.run(Batch(PROMPTS[2], [0], [2], [[0]], [1], [2]))[0, :VOCABULARY]
    assert torch.allclose(few_V, expected[2], atol=1e-4)
    runner.close()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_adapters_add_to_rounded_weights_as_they_do_to_floats(folders: Path, kind: str) -> None:
    """An adapter stays in floats: beside a rounded base it adds what it adds beside that base in floats."""
    rounded = load_model(open_checkpoint(folders / "base"), device="cpu", dtype=torch.float32, rounding=kind)
    same = load_model(open_checkpoint(folders / "base"), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for name, module in same.named_modules():
            if isinstance(module, nn.Linear):
                twin = rounded.get_submodule(name)
                assert isinstance(twin, RoundedLinear)
                module.weight.copy_(twin.dense(torch.float32))
    found, expected = (_first_step(TorchRunner(model, blocks=8), folders / "every") for model in (rounded, same))
    error = (found - expected).norm() / expected.norm()
    assert error < (0.1 if kind == "float8" else 1e-5), "only float8 rounds what goes into a product too"
    assert (found[0] - found[1]).abs().max() > 0.5, "the adapter adds something"


def _first_step(runner: Runner, adapter: Path) -> Tensor:
    """The logits after one prompt through the adapter and without it."""
    runner.add_adapter(1, load_adapter(adapter, runner.config))
    prompt = PROMPTS[0]
    return runner.run(Batch([*prompt, *prompt], [0, 0], [5, 5], [[0], [1]], [4, 9], [1, 0])).clone()


def test_two_ranks_run_adapters_as_one_process_does(folders: Path, expected: list[Tensor]) -> None:
    """Each has a part of every half, and those that are split by their inputs are added up."""
    asked = {"checkpoint": str(folders / "base"), "device": "cpu", "tensor_parallel": 2, "max_sequences": 4}
    config = MetaReferenceConfig.model_validate({"models": {"m": asked}}).models["m"]
    choices = [Choice(wants_logprobs=True)]
    with closing(Workers("m", config)) as workers:
        workers.open()
        workers.load(VOCABULARY)
        with pytest.raises(CheckpointError, match="no such folder"):
            workers.add_adapter(1, str(folders / "nowhere"))
        for number, name in ((1, "every"), (2, "few")):
            workers.add_adapter(number, str(folders / name))
        for prompt, adapter, expected_V in zip(PROMPTS, ADAPTERS, expected, strict=True):
            count = len(prompt)
            (picked,) = workers.execute(Batch(prompt, [0], [count], [[0]], [count - 1], [adapter]), choices)
            assert picked is not None
            logprob_V = expected_V.log_softmax(-1)
            assert picked.token == int(expected_V.argmax())
            assert picked.logprob == pytest.approx(float(logprob_V.max()), abs=1e-4)


def test_an_adapter_that_ends_its_process_does_not_keep_the_model_down(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start passes it over: its requests fail, those of others are answered."""
    asked = {"checkpoint": str(folders / "base"), "device": "cpu", "max_sequences": 4}
    config = MetaReferenceConfig.model_validate({"models": {"m": asked}}).models["m"]
    batch = Batch([5, 5, 5], [0, 0, 0], [1, 1, 1], [[0], [1], [2]], [0, 1, 2], [0, 1, 2])
    with closing(Workers("m", config)) as workers:
        workers.open()
        workers.load(VOCABULARY)
        for number, name in ((1, "every"), (2, "few")):
            workers.add_adapter(number, str(folders / name))
        expected = workers.execute(batch, [Choice()] * 3)
        os.kill(workers._workers[0].process.pid, signal.SIGKILL)
        add = workers._add_adapter

        def deadly(adapter: int, folder: str) -> None:
            if adapter == 1:
                os.kill(workers._workers[0].process.pid, signal.SIGKILL)
            add(adapter, folder)

        monkeypatch.setattr(workers, "_add_adapter", deadly)
        with pytest.raises(ExecutorLostError):
            workers.reset()
        workers.reset()
        assert workers.execute(batch, [Choice()] * 3) == [expected[0], None, expected[2]]


@asynccontextmanager
async def serving(
    folders: Path, *, root: Path | None = None, **settings: Any
) -> AsyncIterator[tuple[MetaReferenceInference, Engine]]:
    model = {"checkpoint": str(folders / "base"), "device": "cpu", "max_sequences": 4} | settings
    asked: dict[str, Any] = {"models": {"m": model}, "aliases": {"llama3_8b": "m"}}
    if root is not None:
        asked["adapters_folder"] = str(root)
    async with serve(MetaReferenceConfig.model_validate(asked)) as provider:
        yield provider, provider._models["m"].engine


async def text(provider: MetaReferenceInference, model: str, most: int = 12) -> str:
    request = CompletionRequest(model=model, content="The cat", max_tokens=most, sampling_params=SamplingParams())
    answer = await provider.completion(request)
    assert isinstance(answer, CompletionResponse)
    assert isinstance(answer.content, str)
    return answer.content


async def test_adapters_that_the_distribution_names_are_models_from_the_start(folders: Path) -> None:
    """Listed beside their base, with what they belong to."""
    adapters = {"every": str(folders / "every"), "few": str(folders / "few")}
    async with serving(folders, adapters=adapters, process="shared") as (provider, _):
        answers = {name: await text(provider, name) for name in ("m", "every", "few", "llama3_8b")}
        assert len(set(answers.values())) == 3
        assert answers["llama3_8b"] == answers["m"]
        assert {model.model: model.metadata.get("adapter_of") for model in await provider.models()} == {
            "m": None, "every": "m", "few": "m", "llama3_8b": None,
        }  # fmt: skip
        together = await asyncio.gather(*(text(provider, name) for name in answers))
        assert together == list(answers.values())


async def test_an_adapter_comes_and_goes_while_others_are_answered(folders: Path) -> None:
    """No restart: its name is served as soon as the call returns, and gone as soon as it is removed."""
    async with serving(folders, root=folders) as (provider, engine):
        base = await text(provider, "m", 100)
        long = asyncio.create_task(text(provider, "m", 100))
        asked = AddAdapterRequest(model="m", adapter="tuned", folder="every")
        served = await provider.add_adapter(asked)
        assert (served.model, served.metadata["adapter_of"]) == ("tuned", "m")
        assert await provider.add_adapter(asked) == served
        first = await text(provider, "tuned")
        assert first != (await text(provider, "m"))
        tail = asyncio.create_task(text(provider, "tuned", 100))
        while engine.running + engine.waiting == 0:
            await asyncio.sleep(0)
        await provider.remove_adapter(RemoveAdapterRequest(model="tuned"))
        with pytest.raises(ModelNotFoundError):
            await text(provider, "tuned")
        assert (await tail).startswith(first)
        assert await long == base
        with pytest.raises(ModelNotFoundError):
            await provider.remove_adapter(RemoveAdapterRequest(model="tuned"))
        await provider.add_adapter(AddAdapterRequest(model="m", adapter="tuned", folder="few"))
        assert await text(provider, "tuned") != first  # nothing of the former one's cache
        assert engine.free_blocks == engine.blocks


async def test_an_adapter_that_goes_while_a_prompt_is_encoded_takes_nobody_with_it(folders: Path) -> None:
    """The request alone is refused: a step through what is not there any more would fail everyone's answer."""
    async with serving(folders, root=folders, process="shared") as (provider, engine):
        add = AddAdapterRequest(model="m", adapter="tuned", folder="every")
        for successor in (None, "few"):
            await provider.add_adapter(add)
            many = BatchCompletionRequest(
                model="tuned", content_batch=["The cat"] * 50, max_tokens=2, sampling_params=SamplingParams()
            )  # so many are encoded in a thread
            asked = asyncio.create_task(provider.batch_completion(many))
            await asyncio.sleep(0)
            await provider.remove_adapter(RemoveAdapterRequest(model="tuned"))
            if successor:
                await provider.add_adapter(AddAdapterRequest(model="m", adapter="tuned", folder=successor))
            with pytest.raises(ModelNotFoundError):
                await asked
        assert await text(provider, "m")
        assert engine.metrics().failed_steps == 0


async def test_an_adapter_whose_caller_has_left_is_not_kept(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows its number, so nobody could ever remove it."""
    async with serving(folders, root=folders, process="shared") as (provider, engine):
        executor, held = engine._executor, dict[int, str]()
        reading, go_on, removed = threading.Event(), threading.Event(), threading.Event()

        def add(adapter: int, folder: str) -> None:
            reading.set()
            assert go_on.wait(30)
            held[adapter] = folder

        def remove(adapter: int) -> None:
            held.pop(adapter, None)
            removed.set()

        monkeypatch.setattr(executor, "add_adapter", add)
        monkeypatch.setattr(executor, "remove_adapter", remove)
        asked = asyncio.create_task(provider.add_adapter(AddAdapterRequest(model="m", adapter="a", folder="every")))
        assert await asyncio.to_thread(reading.wait, 30)
        asked.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert await asyncio.to_thread(removed.wait, 5)
        assert not held


async def test_while_an_engine_cannot_be_restarted_no_adapter_waits_for_it(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who adds one is told so, as who asks for an answer is; and adapters of other models do not wait behind it."""
    monkeypatch.setattr(engine_module, "_FIRST_PAUSE_SECONDS", 0.001)
    async with serving(folders, root=folders, process="shared") as (provider, engine):

        def fail() -> None:
            raise ExecutorLostError("no memory")

        monkeypatch.setattr(engine._executor, "check", fail)
        monkeypatch.setattr(engine._executor, "reset", fail)
        async with asyncio.timeout(30):
            while "5 tries have failed" not in (engine.trouble or ""):
                with pytest.raises(EngineRestartedError):
                    await provider.add_adapter(AddAdapterRequest(model="m", adapter="a", folder="every"))


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        ({"model": "nobody", "adapter": "a", "folder": "every"}, ModelNotFoundError),
        ({"model": "m", "adapter": "m", "folder": "every"}, AlreadyExistsError),
        ({"model": "m", "adapter": "llama3_8b", "folder": "every"}, AlreadyExistsError),
        ({"model": "m", "adapter": "a", "folder": "nowhere"}, InvalidRequestError),
        ({"model": "m", "adapter": "a", "folder": "base"}, InvalidRequestError),
        ({"model": "m", "adapter": "a", "folder": "../every"}, InvalidRequestError),
        ({"model": "m", "adapter": "a", "folder": ".."}, InvalidRequestError),
        ({"model": "m", "adapter": "a", "folder": "/etc"}, InvalidRequestError),
        ({"model": "m", "adapter": "a", "folder": "link"}, InvalidRequestError),
    ],
)
async def test_what_cannot_be_added_is_refused_and_changes_nothing(
    folders: Path, tmp_path: Path, request_: dict[str, str], kind: type[Exception]
) -> None:
    """Neither a name that is taken nor a way out of the folder that the operator set aside; no path comes back."""
    root = tmp_path / "root"
    shutil.copytree(folders / "every", root / "every")
    shutil.copytree(folders / "base", root / "base")
    (root / "link").symlink_to(folders / "every")
    async with serving(folders, root=root, process="shared") as (provider, engine):
        before = await provider.models()
        with pytest.raises(kind) as refused:
            await provider.add_adapter(AddAdapterRequest(**request_))
        assert str(tmp_path) not in str(refused.value)
        assert await provider.models() == before
        assert await text(provider, "m")
        assert engine.trouble is None


async def test_a_base_takes_only_so_many_adapters(folders: Path) -> None:
    """Each stays in memory, and comes back with a process that ran out of it."""
    adapters = {"named": str(folders / "few")}
    async with serving(folders, root=folders, adapters=adapters, max_adapters=2, process="shared") as (provider, _):
        for name, kind in (("a", None), ("b", ConflictError), ("b", ConflictError)):
            with pytest.raises(kind) if kind else nullcontext():
                await provider.add_adapter(AddAdapterRequest(model="m", adapter=name, folder="every"))
        await provider.remove_adapter(RemoveAdapterRequest(model="a"))
        await provider.add_adapter(AddAdapterRequest(model="m", adapter="b", folder="every"))


async def test_without_a_folder_set_aside_no_request_adds_or_removes_any(folders: Path) -> None:
    """Which files the server opens is the operator's choice, and so is what it serves: none could be brought back."""
    async with serving(folders, adapters={"few": str(folders / "few")}, process="shared") as (provider, _):
        with pytest.raises(ForbiddenError, match="adapters_folder"):
            await provider.add_adapter(AddAdapterRequest(model="m", adapter="a", folder="every"))
        with pytest.raises(ForbiddenError, match="adapters_folder"):
            await provider.remove_adapter(RemoveAdapterRequest(model="few"))
        assert await text(provider, "few")


async def test_adapters_come_back_with_their_process_and_a_lost_one_fails_alone(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One whose folder has gone since answers 503, never with the base's words, until it is removed."""
    shutil.copytree(folders / "every", tmp_path / "every")
    adapters = {"kept": str(folders / "few"), "lost": str(tmp_path / "every")}
    async with serving(folders, root=folders, adapters=adapters) as (provider, engine):
        workers = engine._executor
        assert isinstance(workers, Workers)
        answers = [await text(provider, name) for name in ("m", "kept", "lost")]
        shutil.rmtree(tmp_path / "every")
        os.kill(workers._workers[0].process.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while engine.restarts == 0:
                await asyncio.sleep(0.01)
        assert [await text(provider, name) for name in ("m", "kept")] == answers[:2]
        with pytest.raises(EngineRestartedError, match="the adapter was lost"):
            await text(provider, "lost")
        assert "an adapter of model 'm' is lost" in caplog.text
        assert "not finite" not in caplog.text
        await provider.remove_adapter(RemoveAdapterRequest(model="lost"))
        with pytest.raises(ModelNotFoundError):
            await text(provider, "lost")
        assert await text(provider, "m") == answers[0]

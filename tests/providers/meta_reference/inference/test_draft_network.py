"""A small network that guesses for a large one: the same answers in fewer steps."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_stack_meta_reference.config import MetaReferenceConfig, ModelConfig
from llama_stack_meta_reference.inference.executor import ModelFacts
from llama_stack_meta_reference.inference.loading import open_model
from llama_stack_meta_reference.inference.provider import serve
from llama_stack_meta_reference.inference.workers import Workers
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.quantize import quantize
from pydantic import ValidationError

from llama_stack.apis.common import Dialog, Message, SamplingParams
from llama_stack.apis.inference import ChatCompletionRequest, ChatCompletionResponse
from llama_stack.errors import CheckpointError
from tests.providers.meta_reference.kernels import NEEDS_KERNELS
from tests.providers.meta_reference.lookup import lookup_llama
from tests.providers.meta_reference.small_llama import SMALL
from tests.providers.meta_reference.stepping import Stepper

pytestmark = pytest.mark.anyio

BUILTIN = ModelConfig(checkpoint="builtin:tiny").folder
PROMPTS = [[7, 3, 250, 11, 11, 90, 8], [1], [200, 201, 202] * 8]


@pytest.mark.parametrize("kernels", ["plain", pytest.param("compiled", marks=NEEDS_KERNELS)])
def test_answers_are_the_same_whatever_the_draft_network_guesses(small_model: Llama, kernels: str) -> None:
    """It may be as good as the large one or know nothing: what the large one picks stands."""
    stranger = Llama(SMALL, device="cpu", dtype=torch.float32)
    stranger.initialize(torch.Generator().manual_seed(9), std=0.2)
    expected = Stepper(small_model).generate(PROMPTS, 40)
    for draft, is_good in ((small_model, True), (stranger, False)):
        drafted = Stepper(small_model, kernels=kernels, draft=draft, draft_tokens=4)
        assert drafted.generate(PROMPTS, 40) == expected
        metrics = drafted.scheduler.metrics
        assert metrics.drafted_tokens > 0
        assert (metrics.accepted_tokens > 0.8 * metrics.drafted_tokens) == is_good
        assert (drafted.steps < 20) == is_good


def test_a_right_guess_saves_its_steps() -> None:
    """Four guessed tokens and the one after them: a fifth of the steps, after the prompt's."""
    counting = lookup_llama({token: (token + 1) % 7 for token in range(7)}, 8)
    drafted = Stepper(counting, draft=counting, draft_tokens=4)
    assert drafted.generate([[0]], 101)[0] == [(1 + place) % 7 for place in range(101)]
    assert drafted.steps == 21
    assert drafted.scheduler.metrics.accepted_tokens == 80


def config(**changes: Any) -> dict[str, Any]:
    return {
        "checkpoint": "builtin:tiny",
        "device": "cpu",
        "dtype": "float16",
        "lookup_tokens": 0,
        "max_sequences": 4,
    } | changes


@pytest.mark.parametrize("process", ["shared", "own"])
async def test_a_model_with_a_draft_network_answers_as_without(process: str) -> None:
    """Through the engine, in either process; here the tiny model guesses for itself, and is mostly right."""
    models = {"plain": config(), "drafted": config(draft={"checkpoint": "builtin:tiny", "tokens": 6})}
    asked = {"models": {name: model | {"process": process} for name, model in models.items()}}
    async with serve(MetaReferenceConfig.model_validate(asked)) as provider:
        answers = []
        for name in models:
            request = ChatCompletionRequest(
                model=name, dialog=Dialog(message=Message.user("Hello! Who are you?"), message_history=[]),
                sampling_params=SamplingParams(), max_tokens=60,
            )  # fmt: skip
            answer = await provider.chat_completion(request)
            assert isinstance(answer, ChatCompletionResponse)
            answers.append(answer.content)
        assert answers[0] == answers[1]
        metrics = provider._models["drafted"].engine.metrics()
        assert metrics.accepted_tokens > 0.5 * metrics.drafted_tokens > 0
        assert provider._models["plain"].engine.metrics().drafted_tokens == 0
        facts = {name: provider._models[name].facts for name in models}
        assert facts["drafted"].weight_bytes == 2 * facts["plain"].weight_bytes
        assert facts["drafted"].cache_bytes == 2 * facts["plain"].cache_bytes


async def test_a_draft_network_with_other_tokens_is_refused(worded_checkpoint: Path) -> None:
    """Its ids would mean other words, and every guess would be wrong."""
    asked = {"models": {"m": config(process="shared", draft={"checkpoint": str(worded_checkpoint)})}}
    with pytest.raises(CheckpointError, match="a draft network needs the same"):
        async with serve(MetaReferenceConfig.model_validate(asked)):
            pass


async def test_a_draft_network_that_knows_fewer_tokens_is_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    """A prompt with one of the others would break the step of everyone."""
    folder = tmp_path / "few"
    shutil.copytree(small_checkpoint, folder)
    shutil.copy(BUILTIN / "tokenizer.json", folder)
    asked = {"models": {"m": config(process="shared", draft={"checkpoint": str(folder)})}}
    with pytest.raises(CheckpointError, match="knows 256 tokens of the"):
        async with serve(MetaReferenceConfig.model_validate(asked)):
            pass


def test_a_process_that_is_started_anew_keeps_its_draft_network_as_it_was(tmp_path: Path) -> None:
    """The type that was settled is the model's own: a rounded draft network beside it would grow, and might not fit."""
    quantize(BUILTIN, tmp_path / "rounded", "int4")
    asked = config(
        checkpoint="builtin:tiny", dtype="auto", kernels="plain", draft={"checkpoint": str(tmp_path / "rounded")}
    )
    with closing(Workers("m", ModelConfig.model_validate(asked))) as workers:
        before = workers.open()
        workers.load(before.vocabulary)
        os.kill(workers._workers[0].process.pid, signal.SIGKILL)
        planned = list[int]()
        start = workers._start

        def noted(*arguments: Any, **settled: Any) -> ModelFacts:
            facts = start(*arguments, **settled)
            planned.append(facts.weight_bytes)
            return facts

        workers._start = noted  # type: ignore[method-assign]
        workers.reset()
        assert planned == [before.weight_bytes]


def test_the_context_is_no_longer_than_the_draft_networks(worded_checkpoint: Path) -> None:
    """Beyond what it was made for its guesses are nonsense."""
    asked = config(draft={"checkpoint": str(worded_checkpoint)})
    assert open_model("m", ModelConfig.model_validate(asked)).plan.context == SMALL.max_context
    assert open_model("m", ModelConfig.model_validate(config())).plan.context > SMALL.max_context


def test_a_draft_network_beside_ranks_is_refused() -> None:
    """Ranks that guessed differently would run different steps."""
    with pytest.raises(ValidationError, match="set tensor_parallel: 1"):
        ModelConfig.model_validate(config(draft={"checkpoint": "builtin:tiny"}, tensor_parallel=2))

"""The plugin as the stack finds it, and a stack that runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from llama_stack_meta_reference import plugin
from llama_stack_meta_reference.llama.checkpoint import save_hugging_face
from llama_stack_meta_reference.llama.model import Llama

from llama_stack.apis import Inference, Models
from llama_stack.apis.common import Dialog, Message, StopReason
from llama_stack.apis.contract import Shape, operations
from llama_stack.apis.inference import ChatCompletionRequest, ChatCompletionResponse
from llama_stack.distribution import Distribution
from llama_stack.errors import ProviderStartError
from llama_stack.plugins import discover
from llama_stack.registry import Registry, declaration_problems
from llama_stack.stack import Stack, running
from tests.draft_schemas import DraftSchemas
from tests.providers.meta_reference import checkpoints, small_tokenizer
from tests.providers.meta_reference.small_llama import SMALL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that a server can start: network and tokenizer fit."""
    path = tmp_path_factory.mktemp("served")
    model = Llama(replace(SMALL, vocab_size=856), device="cpu", dtype=torch.float32)
    model.initialize(torch.Generator().manual_seed(0), std=0.2)
    save_hugging_face(model, path)
    small_tokenizer.write_hugging_face(path)
    return path


def stack(tmp_path: Path, **models: dict[str, object]) -> Stack:
    """A stack of one provider with these models, and the alias ``other`` for the first."""
    entry = {"provider": "meta-reference", "config": {"models": models, "aliases": {"other": next(iter(models))}}}
    distribution = Distribution.model_validate({"version": 1, "name": "t", "providers": {"inference": [entry]}})
    return Stack(distribution, Registry(discover([plugin])[:1]), state_folder=tmp_path)


def test_the_installed_package_declares_the_provider() -> None:
    """Distributions name ``meta-reference`` and nothing else leads there but the entry point."""
    found = Registry().provider(Inference, "meta-reference")
    assert found.plugin.package == "llama-stack-meta-reference"
    assert declaration_problems(found.spec) == []


def test_declaring_imports_nothing_heavy() -> None:
    """Listing providers, and starting without this one, must not cost seconds and hundreds of megabytes."""
    code = (
        "import sys, llama_stack_meta_reference.plugin as p; list(p.llama_stack_providers());"
        "print(sorted({'torch', 'numpy', 'tokenizers', 'tiktoken', 'safetensors', 'fastapi'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.anyio
async def test_a_stack_serves_both_layouts_side_by_side_and_leaves_no_thread(tmp_path: Path, folder: Path) -> None:
    """The same weights in either layout give the same answer; after the stop nothing of them runs."""
    reference = checkpoints.random_reference(vocabulary=856)
    for name, write in (("hf", checkpoints.write_hugging_face), ("meta", checkpoints.write_meta)):
        write(reference, tmp_path / name)
    small_tokenizer.write_hugging_face(tmp_path / "hf")
    small_tokenizer.write_meta(tmp_path / "meta")
    models: dict[str, dict[str, object]] = {
        name: {"checkpoint": str(tmp_path / name), "device": "cpu"} for name in ("hf", "meta")
    }
    async with running(stack(tmp_path, **models)) as up:
        inference = up.api(Inference)
        answers = [
            cast(
                ChatCompletionResponse,
                await inference.chat_completion(
                    ChatCompletionRequest(model=name, dialog=Dialog(message=Message.user("hello")), max_tokens=40)
                ),
            )
            for name in ("hf", "meta", "other")
        ]
        assert answers[0] == answers[1] == answers[2]
        assert answers[0].content
        assert answers[0].stop_reason in (StopReason.MAX_TOKENS, StopReason.FINISHED_OK)
        served = [model async for model in await up.api(Models).list_models()]
        assert [(model.model, model.alias_of, model.device, model.metadata["layout"]) for model in served] == [
            ("hf", None, "cpu", "hugging_face"),
            ("meta", None, "cpu", "meta"),
            ("other", "hf", "cpu", "hugging_face"),
        ]
        assert str(tmp_path) not in str(served)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("engine")]


@pytest.mark.anyio
async def test_a_model_that_does_not_start_stops_those_that_did(tmp_path: Path, folder: Path) -> None:
    """The second model of a list is missing: the error says where, and the first one's thread is gone."""
    models: dict[str, dict[str, object]] = {
        "good": {"checkpoint": str(folder)},
        "bad": {"checkpoint": str(tmp_path / "nowhere")},
    }
    up = stack(tmp_path, **models)
    try:
        with pytest.raises(ProviderStartError, match="nowhere: no such folder"):
            await up.start()
    finally:
        await up.stop()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("engine")]


@pytest.mark.anyio
async def test_the_shipped_model_answers_by_the_drafts_names(tmp_path: Path) -> None:
    """The tiny distribution's promise: a client that knows only the draft is answered on a fresh machine.

    Bodies and replies are judged by the draft's own schemas, and the streamed answer is the whole one.
    """
    schemas = DraftSchemas()
    shipped = Path(__file__).parents[3] / "distributions" / "tiny.yaml"
    whole_file = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    providers = {"inference": [p for p in whole_file["providers"]["inference"] if p["provider"] == "meta-reference"]}
    distribution = Distribution.model_validate({"version": 1, "name": "tiny", "providers": providers})
    sampling = {"temperature": 0.0, "strategy": "greedy", "top_p": 0.95, "top_k": 0}
    message = {"role": "user", "content": "Hello!", "tool_calls": [], "tool_responses": []}
    dialog = {"message": message, "message_history": []}
    common = {"sampling_params": sampling, "max_tokens": 60, "logprobs": False}
    chat = {"model": "llama3_8b_chat", "available_tools": [], **common}
    bodies: dict[str, dict[str, Any]] = {
        "completion": {"model": "llama3_8b", "content": "Hello", "stream": False, **common},
        "chat_completion": {"dialog": dialog, "stream": False, **chat},
        "batch_completion": {"model": "llama3_70b", "content_batch": ["Hello", ""], **common},
        "batch_chat_completion": {"batch_dialogs": [dialog, dialog], **chat},
    }
    texts: dict[str, list[str]] = {}
    async with running(Stack(distribution, Registry(discover([plugin])[:1]), state_folder=tmp_path)) as up:
        inference = up.api(Inference)
        for operation in operations(Inference):
            if operation.is_extension:
                continue
            body = bodies[operation.name]
            schemas.check_request(operation.key, body)
            assert operation.body is not None
            request = operation.body.adapter.validate_json(json.dumps(body))
            answer = await getattr(inference, operation.name)(request)
            whole = [line async for line in answer] if operation.shape is Shape.LINES else [answer]
            for value in whole:
                schemas.check_reply(operation.key, json.loads(value.model_dump_json(exclude_none=True)))
            texts[operation.name] = [value.content for value in whole]
            if operation.shape is Shape.REPLY:
                stream = await getattr(inference, operation.name)(request.model_copy(update={"stream": True}))
                chunks = [chunk async for chunk in stream]
                for chunk in chunks:
                    sent = json.loads(chunk.model_dump_json(exclude_none=True))
                    schemas.check_reply(operation.key, sent, chunk=True)
                assert "".join(chunk.text_delta for chunk in chunks) == whole[0].content
    assert texts["chat_completion"] * 2 == texts["batch_chat_completion"]
    assert texts["completion"] == texts["batch_completion"][:1]
    assert "tiny demo model" in texts["chat_completion"][0]

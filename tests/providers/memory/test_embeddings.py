"""Embeddings over HTTP, beside a provider of the same API that writes text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from llama_stack_memory.embedders import BertEmbedder

from llama_stack.apis.common import Dialog, Message
from llama_stack.apis.inference import ChatCompletionRequest, EmbeddingsRequest
from llama_stack.client import AsyncClient, whole
from llama_stack.distribution import Distribution
from llama_stack.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from llama_stack.plugins import discover
from llama_stack.registry import Registry
from llama_stack.server import listening
from llama_stack.stack import Stack, running
from llama_stack.testing.stub_inference import StubPlugin
from tests.providers.memory.sentence_models import make_sentence_model

pytestmark = pytest.mark.anyio


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_sentence_model(tmp_path / "mine")


@pytest.fixture
async def client(folder: Path, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    """A server with a stub that writes, and with the model in ``folder``."""
    inference = [{"provider": "stub"}, {"provider": "embeddings", "config": {"embedder": str(folder)}}]
    distribution = Distribution.model_validate(
        {"version": 1, "name": "t", "providers": {"inference": inference}, "server": {"port": 0, "drain_seconds": 1}}
    )
    stack = Stack(distribution, Registry(discover([StubPlugin()])), state_folder=tmp_path / "state")
    async with running(stack), listening(stack) as server, AsyncClient(server.url) as client:
        yield client


async def test_texts_become_vectors_in_their_order(client: AsyncClient, folder: Path) -> None:
    """More of them than fit one batch, and none."""
    embedder = BertEmbedder(folder)
    texts = [f"{'rain ' * (n % 7)}sea" for n in range(70)]
    reply = await client.inference.embeddings(EmbeddingsRequest(model=embedder.name, contents=texts))
    assert np.allclose(reply.embeddings, embedder.embed(texts), atol=2e-6)
    empty = await client.inference.embeddings(EmbeddingsRequest(model=embedder.name, contents=[]))
    assert empty.embeddings == []


async def test_a_request_goes_to_the_provider_of_its_model(client: AsyncClient, folder: Path) -> None:
    """The catalogue says what each model is for; asking it for something else is the caller's mistake."""
    name = BertEmbedder(folder).name
    models = {model.model: model async for model in await client.models.list_models()}
    assert (models[name].kind, models[name].embedding_dimensions, models[name].context_tokens) == ("embedding", 24, 30)
    dialog = Dialog(message=Message.user("Hi"))
    assert whole(await client.inference.chat_completion(ChatCompletionRequest(model="stub", dialog=dialog))).content
    with pytest.raises(InvalidRequestError, match="turns texts into vectors"):
        await client.inference.chat_completion(ChatCompletionRequest(model=name, dialog=dialog))
    with pytest.raises(ModelNotFoundError):
        await client.inference.embeddings(EmbeddingsRequest(model="none", contents=["a"]))


async def test_a_text_that_is_too_long_is_refused(client: AsyncClient, folder: Path) -> None:
    """Nothing is cut in silence; the fault says which text."""
    request = EmbeddingsRequest(model=BertEmbedder(folder).name, contents=["rain", "sea " * 31])
    with pytest.raises(ContextLengthError) as refused:
        await client.inference.embeddings(request)
    assert refused.value.faults[0].pointer == "/contents/1"

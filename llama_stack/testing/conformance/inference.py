"""Checks of Inference."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from ...apis import Inference
from ...apis.common import Dialog, Message, Schema, StopReason, ToolDefinition
from ...apis.inference import (
    BatchChatCompletionRequest,
    BatchCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseStreamChunk,
    CompletionRequest,
    CompletionResponse,
    CompletionResponseStreamChunk,
    EmbeddingsRequest,
    EmbeddingsResponse,
)
from ...apis.models import ModelKind
from ...errors import InvalidRequestError, ModelNotFoundError, NotFoundError
from .checks import Skipped, check, everything, refused
from .subject import Subject

_TEXTS = ("Once upon a time", "The capital of Norway is", "One, two, three,")
_LONG = 24
"""Tokens of a long answer; few, so that a slow model is tested too."""
_IDLE_SECONDS = 5.0


async def _completion(subject: Subject, text: str, **more: Any) -> CompletionResponse:
    request = CompletionRequest(content=text, model=await subject.model(), **{"max_tokens": _LONG, **more})
    answer = await subject.client.inference.completion(request)
    assert isinstance(answer, CompletionResponse), "a whole answer was asked for"
    return answer


async def _chat(subject: Subject, text: str, **more: Any) -> ChatCompletionResponse:
    request = await _chat_request(subject, text, **more)
    answer = await subject.client.inference.chat_completion(request)
    assert isinstance(answer, ChatCompletionResponse), "a whole answer was asked for"
    return answer


async def _chat_request(subject: Subject, text: str, **more: Any) -> ChatCompletionRequest:
    dialog = Dialog(message=Message.user(text))
    return ChatCompletionRequest(dialog=dialog, model=await subject.model(), **{"max_tokens": _LONG, **more})


def _check_same(chunks: Sequence[Any], whole: CompletionResponse | ChatCompletionResponse, kind: type[Schema]) -> None:
    """The chunks are of the kind, add up to the whole answer, and stop where it stops."""
    assert all(isinstance(chunk, kind) for chunk in chunks)
    _check_stops(chunks)
    text = "".join(chunk.text_delta for chunk in chunks)
    assert text == whole.content, f"streamed {text!r}, whole {whole.content!r}"
    assert chunks[-1].stop_reason is whole.stop_reason, "the stream stopped for another reason"


def _check_stops(chunks: Sequence[Any]) -> None:
    assert chunks, "the stream is empty"
    goes_on = (None, StopReason.NOT_STOPPED)
    early = [chunk.stop_reason for chunk in chunks[:-1] if chunk.stop_reason not in goes_on]
    assert not early, f"a chunk before the last says {early[0]}"
    assert chunks[-1].stop_reason not in goes_on, "the last chunk does not say why it stopped"


@check(Inference)
async def models_are_listed_once_each(subject: Subject) -> None:
    """Every model is listed under a name of its own, and an alias names a model that is listed."""
    models = await subject.models()
    if not models:
        raise Skipped("no model is served")
    names = [model.model for model in models]
    assert len(set(names)) == len(names), f"a name is listed twice: {sorted(names)}"
    lost = [model.model for model in models if model.alias_of is not None and model.alias_of not in names]
    assert not lost, f"aliases of models that are not listed: {lost}"


@check(Inference)
async def a_text_is_continued(subject: Subject) -> None:
    """A completion ends with a reason, and not with not_stopped."""
    answer = await _completion(subject, _TEXTS[0])
    assert answer.stop_reason is not StopReason.NOT_STOPPED, "a whole answer says not_stopped"


@check(Inference)
async def a_dialog_is_answered(subject: Subject) -> None:
    """A chat completion ends with a reason, and not with not_stopped."""
    answer = await _chat(subject, "Hello!")
    assert answer.stop_reason is not StopReason.NOT_STOPPED, "a whole answer says not_stopped"


@check(Inference)
async def greedy_answers_repeat(subject: Subject) -> None:
    """The same greedy request gets the same answer."""
    first, second = [await _chat(subject, "Hello!") for _ in range(2)]
    assert first == second, f"{first.content!r}, then {second.content!r}"


@check(Inference)
async def a_streamed_completion_is_the_whole_one(subject: Subject) -> None:
    """The pieces of a streamed completion add up to the whole one, and the last chunk alone says why it stopped."""
    whole = await _completion(subject, _TEXTS[0])
    request = CompletionRequest(content=_TEXTS[0], model=await subject.model(), max_tokens=_LONG, stream=True)
    chunks = await everything(await subject.client.inference.completion(request))
    _check_same(chunks, whole, CompletionResponseStreamChunk)


@check(Inference)
async def a_streamed_answer_is_the_whole_one(subject: Subject) -> None:
    """The pieces of a streamed chat add up to the whole answer, and the last chunk alone says why it stopped."""
    whole = await _chat(subject, "Hello!")
    chunks = await everything(
        await subject.client.inference.chat_completion(await _chat_request(subject, "Hello!", stream=True))
    )
    _check_same(chunks, whole, ChatCompletionResponseStreamChunk)


@check(Inference)
async def streamed_calls_are_the_whole_ones(subject: Subject) -> None:
    """With tools, each call is one whole chunk, and the calls and texts of a stream are those of the whole answer."""
    tool = ToolDefinition(
        tool_name="get_weather", description="The weather of a city", parameters={"city": {"type": "string"}}
    )
    text = "What is the weather in Oslo? Use the tool."
    whole = await _chat(subject, text, available_tools=[tool], max_tokens=64)
    chunks = await everything(
        await subject.client.inference.chat_completion(
            await _chat_request(subject, text, available_tools=[tool], max_tokens=64, stream=True)
        )
    )
    calls = [chunk.tool_call for chunk in chunks if chunk.tool_call is not None]
    assert calls == whole.tool_calls, f"streamed {calls}, whole {whole.tool_calls}"
    assert "".join(chunk.text_delta for chunk in chunks) == whole.content, "the texts differ"


@check(Inference)
async def a_batch_keeps_its_order(subject: Subject) -> None:
    """Each line of a batch answers the text in its place, as that text is answered alone."""
    alone = [(await _completion(subject, text)).content for text in _TEXTS]
    request = BatchCompletionRequest(content_batch=list(_TEXTS), model=await subject.model(), max_tokens=_LONG)
    lines = await everything(await subject.client.inference.batch_completion(request))
    assert [line.content for line in lines] == alone, f"batch {[line.content for line in lines]!r}, alone {alone!r}"


@check(Inference)
async def a_batch_of_dialogs_keeps_its_order(subject: Subject) -> None:
    """Each line of a batch answers the dialog in its place, as that dialog is answered alone."""
    alone = [(await _chat(subject, text)).content for text in _TEXTS]
    dialogs = [Dialog(message=Message.user(text)) for text in _TEXTS]
    request = BatchChatCompletionRequest(batch_dialogs=dialogs, model=await subject.model(), max_tokens=_LONG)
    lines = await everything(await subject.client.inference.batch_chat_completion(request))
    assert [line.content for line in lines] == alone, f"batch {[line.content for line in lines]!r}, alone {alone!r}"


@check(Inference)
async def an_empty_batch_has_no_lines(subject: Subject) -> None:
    """A batch of nothing is answered with nothing."""
    request = BatchCompletionRequest(content_batch=[], model=await subject.model())
    assert await everything(await subject.client.inference.batch_completion(request)) == [], "lines without texts"


@check(Inference)
async def a_model_that_is_not_served_is_404(subject: Subject) -> None:
    """Every operation refuses a model that nobody serves with 404, streamed ones before their first byte."""
    inference, name = subject.client.inference, subject.new_id("no-model")
    dialog = Dialog(message=Message.user("Hello!"))
    await refused(inference.completion(CompletionRequest(content="a", model=name)), ModelNotFoundError, NotFoundError)
    for stream in (False, True):
        request = ChatCompletionRequest(dialog=dialog, model=name, stream=stream)
        await refused(inference.chat_completion(request), ModelNotFoundError, NotFoundError)
    batch = BatchCompletionRequest(content_batch=["a"], model=name)
    await refused(inference.batch_completion(batch), ModelNotFoundError, NotFoundError)
    dialogs = BatchChatCompletionRequest(batch_dialogs=[dialog], model=name)
    await refused(inference.batch_chat_completion(dialogs), ModelNotFoundError, NotFoundError)


@check(Inference)
async def max_tokens_cuts_an_answer(subject: Subject) -> None:
    """An answer of at most one token begins as the longer one does, and says max_tokens where more would follow."""
    longer = str((await _completion(subject, _TEXTS[0])).content)
    answer = await _completion(subject, _TEXTS[0], max_tokens=1)
    cut = str(answer.content)
    assert longer.startswith(cut), f"{cut!r} is no beginning of {longer!r}"
    if len(cut) < len(longer):
        assert answer.stop_reason is StopReason.MAX_TOKENS, f"it was cut and says {answer.stop_reason}"


@check(Inference)
async def logprobs_come_when_asked_for(subject: Subject) -> None:
    """Log-probabilities are in a reply only where they were asked for, one a token and none above 0."""
    assert (await _completion(subject, _TEXTS[0])).logprobs is None, "they came without being asked for"
    asked = (await _completion(subject, _TEXTS[0], logprobs=True)).logprobs
    if asked is None:
        raise Skipped("the provider gives none")
    tokens, values = asked.get("tokens"), asked.get("token_logprobs")
    assert isinstance(tokens, list), f"logprobs has no list of tokens: {sorted(asked)}"
    assert isinstance(values, list), f"logprobs has no list of token_logprobs: {sorted(asked)}"
    assert len(tokens) == len(values), f"{len(tokens)} tokens, {len(values)} values"
    assert all(isinstance(value, float | int) and value <= 1e-6 for value in values), "a value is above 0"


@check(Inference)
async def requests_at_once_are_answered_as_alone(subject: Subject) -> None:
    """Eight requests at a time get the answers that each gets alone."""
    texts = [f"{text} {number}" for number in range(2) for text in (*_TEXTS, "Hello!")]
    alone = [(await _completion(subject, text)).content for text in texts]
    together = await asyncio.gather(*(_completion(subject, text) for text in texts))
    wrong = [text for text, answer, one in zip(texts, together, alone, strict=True) if answer.content != one]
    assert not wrong, f"other answers beside others: {wrong}"


@check(Inference)
async def a_client_that_leaves_a_stream_stops_the_work(subject: Subject) -> None:
    """After a client has left in the middle of a stream, nothing goes on working for it."""
    busy = subject.busy
    request = await _chat_request(subject, "Tell me a long story.", stream=True, max_tokens=512)
    stream: Any = await subject.client.inference.chat_completion(request)
    await anext(stream)
    await stream.aclose()
    assert (await _chat(subject, "Hello!")).stop_reason is not StopReason.NOT_STOPPED
    if busy is not None:
        await _idle(busy)


@check(Inference)
async def a_client_that_leaves_stops_a_whole_answer_too(subject: Subject) -> None:
    """After a client has hung up on a plain request, nothing goes on working for it."""
    request = await _chat_request(subject, "Tell me a long story.", max_tokens=512)
    call = asyncio.create_task(_until_cancelled(subject.client.inference.chat_completion(request)))
    await asyncio.sleep(0.05)
    call.cancel()
    await asyncio.wait([call])
    assert (await _chat(subject, "Hello!")).stop_reason is not StopReason.NOT_STOPPED
    if subject.busy is not None:
        await _idle(subject.busy)


async def _until_cancelled(call: Any) -> Any:
    return await call


async def _idle(busy: Any) -> None:
    deadline = asyncio.get_running_loop().time() + _IDLE_SECONDS
    while (left := busy()) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110  # nobody tells
        await asyncio.sleep(0.02)
    assert not left, f"the work goes on: {', '.join(left)}"


@check(Inference)
async def numbers_out_of_range_are_422(subject: Subject) -> None:
    """A negative limit or temperature is refused with 422, and names its field."""
    model = await subject.model()
    for wrong in ({"max_tokens": -1}, {"sampling_params": {"temperature": -0.5}}, {"sampling_params": {"top_p": 2}}):
        body = {"model": model, "content": "Hello", **wrong}
        reply = await subject.http.post("/inference/completion", json=body)
        assert reply.status_code == 422, f"{reply.status_code} for {wrong}"
        key = next(iter(wrong.values()))
        field = next(iter(key)) if isinstance(key, dict) else next(iter(wrong))
        assert field in reply.text, f"the refusal does not name {field}"


@check(Inference)
async def the_wire_has_the_contracts_keys_and_no_others(subject: Subject) -> None:
    """A reply's JSON has the keys of the draft, with nothing beside them."""
    body = {"model": await subject.model(), "content": _TEXTS[0], "max_tokens": 4}
    reply = await subject.http.post("/inference/completion", json=body)
    assert reply.status_code == 200, reply.text[:200]
    assert set(reply.json()) == {"content", "stop_reason"}, f"keys {sorted(reply.json())}"
    dialog = {"message": {"role": "user", "content": "Hello!", "tool_calls": [], "tool_responses": []}}
    chat = {"model": await subject.model(), "dialog": dialog | {"message_history": []}, "max_tokens": 4}
    reply = await subject.http.post("/inference/chat_completion", json=chat)
    assert reply.status_code == 200, reply.text[:200]
    assert set(reply.json()) == {"content", "stop_reason", "tool_calls"}, f"keys {sorted(reply.json())}"


@check(Inference)
async def a_stream_is_server_sent_events(subject: Subject) -> None:
    """A streamed answer is text/event-stream, one JSON chunk an event."""
    body = {"model": await subject.model(), "content": _TEXTS[0], "max_tokens": 4, "stream": True}
    reply = await subject.http.post("/inference/completion", json=body)
    kind = reply.headers.get("content-type", "").partition(";")[0]
    assert kind == "text/event-stream", f"the content type is {kind}"
    events = [line for line in reply.text.splitlines() if line.strip()]
    assert all(line.startswith(("data:", ":")) for line in events), "a line is neither data nor a comment"
    last = json.loads([line for line in events if line.startswith("data:")][-1].removeprefix("data:"))
    assert last.get("stop_reason") in ("finished_ok", "max_tokens"), f"the last event is {last}"


@check(Inference)
async def a_prompt_beyond_the_context_is_422(subject: Subject) -> None:
    """A prompt that does not fit the context is refused before it is worked on."""
    name = await subject.model()
    context = next((m.context_tokens for m in await subject.models() if m.model == name), None)
    if context is None or context > 200_000:
        raise Skipped("the model does not say how long its context is")
    request = CompletionRequest(content="word " * (2 * context + 10), model=name, max_tokens=1)
    await refused(subject.client.inference.completion(request), InvalidRequestError)


@check(Inference)
async def models_are_served_again_after_a_restart(subject: Subject) -> None:
    """After a restart the same models give the same greedy answers."""
    before = (await subject.models(), await _completion(subject, _TEXTS[0]))
    await subject.restart()
    names = [model.model for model in await subject.models()]
    assert names == [model.model for model in before[0]], f"now {names}"
    assert (await _completion(subject, _TEXTS[0])).content == before[1].content, "the answer is another one"


@check(Inference)
async def embeddings_have_one_length_and_keep_their_order(subject: Subject) -> None:
    """Each text gets a vector of one length, the same in a batch as alone, and none is made for an unknown model."""
    model = await subject.model(ModelKind.EMBEDDING)
    embed = subject.client.inference.embeddings
    answer: EmbeddingsResponse = await embed(EmbeddingsRequest(model=model, contents=list(_TEXTS)))
    assert len(answer.embeddings) == len(_TEXTS), f"{len(answer.embeddings)} vectors for {len(_TEXTS)} texts"
    assert len({len(vector) for vector in answer.embeddings}) == 1, "the vectors differ in length"
    for text, vector in zip(_TEXTS, answer.embeddings, strict=True):
        [alone] = (await embed(EmbeddingsRequest(model=model, contents=[text]))).embeddings
        far = max(abs(a - b) for a, b in zip(alone, vector, strict=True))
        assert far < 1e-3, f"the vector of {text!r} differs by {far:g} when it is alone"
    unknown = EmbeddingsRequest(model=subject.new_id("no-model"), contents=["a"])
    await refused(embed(unknown), ModelNotFoundError, NotFoundError)

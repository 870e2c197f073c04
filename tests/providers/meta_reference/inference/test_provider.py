"""The Inference API as clients see it, over real engines whose networks write what each test needs."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from llama_stack_meta_reference.config import ModelConfig
from llama_stack_meta_reference.inference.engine import Engine
from llama_stack_meta_reference.inference.executor import ModelFacts
from llama_stack_meta_reference.inference.prompts import PromptEncoder
from llama_stack_meta_reference.inference.provider import MetaReferenceInference
from llama_stack_meta_reference.inference.serving import LoadedModel
from llama_stack_meta_reference.llama.chat_format import ChatFormat
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.llama.tokenizer import SpecialToken, Tokenizer
from pydantic import BaseModel

from llama_stack.apis.common import (
    Attachment,
    Content,
    Dialog,
    Message,
    Role,
    SamplingParams,
    SamplingStrategy,
    StopReason,
    ToolCall,
    ToolDefinition,
    ToolResponse,
)
from llama_stack.apis.inference import (
    BatchChatCompletionRequest,
    BatchCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseStreamChunk,
    CompletionRequest,
    CompletionResponse,
    CompletionResponseStreamChunk,
)
from llama_stack.errors import (
    ContextLengthError,
    DrainingError,
    EngineRestartedError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
)
from tests.draft_schemas import DraftSchemas
from tests.providers.meta_reference.lookup import SPECIALS, byte_tokenizer, lookup_llama, new_engine, writing

pytestmark = pytest.mark.anyio

PYTHON_TAG = SpecialToken("<|python_tag|>")
END_OF_MESSAGE = SpecialToken("<|eom_id|>")
WEATHER = ToolDefinition(tool_name="get_weather", parameters={"city": {"type": "string"}})
SEARCH = ToolDefinition(tool_name="web_search")
IMAGE = Attachment(url="https://example.com/cat.png", mime_type="image/png")


@asynccontextmanager
async def serving(
    tmp_path: Path,
    tokenizer: Tokenizer,
    model: Llama,
    *,
    max_sequences: int = 4,
    queue_size: int = 256,
    encoder: PromptEncoder | None = None,
) -> AsyncIterator[tuple[MetaReferenceInference, Engine]]:
    """A provider of one model, ``m``, that is also called ``llama3_8b``."""
    engine = new_engine(model, tokenizer, max_sequences=max_sequences, queue_size=queue_size)
    config = model.config
    facts = ModelFacts(
        layout="hugging_face",
        tokenizer="tokenizer.json",
        draft_tokenizer=None,
        vocabulary=config.vocab_size,
        eos_ids=(),
        parameters=config.parameter_count,
        trained_context=config.max_context,
        device="cpu",
        dtype="float32",
        kernels="plain",
        context=engine.context,
        blocks=engine.blocks,
        block_tokens=16,
        weight_bytes=4 * config.parameter_count,
        cache_bytes=16 * engine.blocks * 4 * 2 * 2,
    )
    loaded = LoadedModel(
        "m", facts, tokenizer, ChatFormat(tokenizer), engine, ModelConfig(checkpoint="m", max_adapters=1)
    )
    encoder = encoder or PromptEncoder()
    engine.start()
    try:
        yield MetaReferenceInference({"m": loaded}, encoder, {"llama3_8b": "m"}, None), engine
    finally:
        await engine.stop()
        await encoder.close()


def dialog(content: Content = "hi\n", *history: Message) -> Dialog:
    return Dialog(message=Message.user(content), message_history=list(history))


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(**{"model": "m", "dialog": dialog(), **fields})


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest(**{"model": "m", "content": "hi\n", **fields})


async def whole(provider: MetaReferenceInference, request: ChatCompletionRequest) -> ChatCompletionResponse:
    answer = await provider.chat_completion(request)
    assert isinstance(answer, ChatCompletionResponse)
    return answer


async def streamed(
    provider: MetaReferenceInference, request: ChatCompletionRequest
) -> list[ChatCompletionResponseStreamChunk]:
    answer = await provider.chat_completion(request.model_copy(update={"stream": True}))
    return [chunk async for chunk in cast(AsyncIterator[ChatCompletionResponseStreamChunk], answer)]


async def whole_text(provider: MetaReferenceInference, request: CompletionRequest) -> CompletionResponse:
    answer = await provider.completion(request)
    assert isinstance(answer, CompletionResponse)
    return answer


async def streamed_text(
    provider: MetaReferenceInference, request: CompletionRequest
) -> list[CompletionResponseStreamChunk]:
    answer = await provider.completion(request.model_copy(update={"stream": True}))
    return [chunk async for chunk in cast(AsyncIterator[CompletionResponseStreamChunk], answer)]


REPLIES: list[tuple[Sequence[bytes | SpecialToken], list[ToolDefinition], str, list[ToolCall]]] = [
    ([b"Hello", b" wor", b"ld", b"!"], [], "Hello world!", []),
    ([], [], "", []),
    (["世界😀".encode()[i : i + 1] for i in range(10)], [], "世界😀", []),
    ([b"\xe4\xb8", "é".encode()], [], "\ufffdé", []),
    (
        [b'{"name": "get_', b'weather", "parameters"', b': {"city": "Os', "lö".encode()[:2], "lö".encode()[2:], b'"}}'],
        [WEATHER],
        "",
        [ToolCall(tool_name="get_weather", arguments={"city": "Oslö"})],
    ),
    (
        [b"Let me see.\n", b'{"name": "get_weather", "parameters": {"city": "A"}}; ', b'{"name": "get_weather", ', b'"parameters": {"city": "B"}}'],  # noqa: E501
        [WEATHER],
        "Let me see.\n",
        [ToolCall(tool_name="get_weather", arguments={"city": city}) for city in "AB"],
    ),
    (
        [PYTHON_TAG, b"brave_search", b'.call(query="llamas")', END_OF_MESSAGE],
        [SEARCH],
        "",
        [ToolCall(tool_name="web_search", arguments={"query": "llamas"})],
    ),
    (
        [PYTHON_TAG, b"print(", b"1)", END_OF_MESSAGE],
        [ToolDefinition(tool_name="code_interpreter")],
        "",
        [ToolCall(tool_name="code_interpreter", arguments={"code": "print(1)"})],
    ),
    ([b'{"name": "get_weather", "parameters": {}}'], [], '{"name": "get_weather", "parameters": {}}', []),
    ([b'{"name": "unknown", "parameters": {}}'], [WEATHER], '{"name": "unknown", "parameters": {}}', []),
]  # fmt: skip


@pytest.mark.parametrize(("pieces", "tools", "text", "calls"), REPLIES)
async def test_a_streamed_reply_is_the_whole_reply_in_pieces(
    tmp_path: Path,
    pieces: Sequence[bytes | SpecialToken],
    tools: list[ToolDefinition],
    text: str,
    calls: list[ToolCall],
) -> None:
    """Peers parse calls of streams in another way than those of whole replies, and split characters."""
    async with serving(tmp_path, *writing(pieces)) as (provider, _):
        request = chat(available_tools=tools)
        answer = await whole(provider, request)
        assert answer == ChatCompletionResponse(content=text, stop_reason=StopReason.FINISHED_OK, tool_calls=calls)
        chunks = await streamed(provider, request)
        assert "".join(chunk.text_delta for chunk in chunks) == text
        assert [chunk.tool_call for chunk in chunks if chunk.tool_call] == calls
        assert not any(chunk.text_delta for chunk in chunks if chunk.tool_call)
        assert [chunk.stop_reason for chunk in chunks] == [
            *[StopReason.NOT_STOPPED] * (len(chunks) - 1),
            StopReason.FINISHED_OK,
        ]


async def test_a_stream_gives_text_while_the_model_writes(tmp_path: Path) -> None:
    """Each token's text is a chunk of its own: nothing waits for the end."""
    async with serving(tmp_path, *writing([b"a", b"b", b"c"])) as (provider, _):
        assert [chunk.text_delta for chunk in await streamed(provider, chat())] == ["a", "b", "c", ""]


async def test_a_reply_cut_by_max_tokens_says_so_and_keeps_its_text(tmp_path: Path) -> None:
    """Half a call is no call, and half a program is not to be run: both come back as the text that was written."""
    pieces: list[bytes | SpecialToken] = [b'{"name": "get_weather", ', b'"parameters": {"city"', b': "Oslo"}}']
    async with serving(tmp_path, *writing(pieces)) as (provider, _):
        request = chat(available_tools=[WEATHER], max_tokens=2)
        answer = await whole(provider, request)
        assert answer.content == '{"name": "get_weather", "parameters": {"city"'
        assert answer.tool_calls == []
        assert answer.stop_reason is StopReason.MAX_TOKENS
        chunks = await streamed(provider, request)
        assert "".join(chunk.text_delta for chunk in chunks) == answer.content
        assert chunks[-1].stop_reason is StopReason.MAX_TOKENS
    tokenizer, model = writing([PYTHON_TAG, b"rm -r ", b"/tmp/x"])
    async with serving(tmp_path, tokenizer, model) as (provider, _):
        request = chat(available_tools=[ToolDefinition(tool_name="code_interpreter")], max_tokens=2)
        answer = await whole(provider, request)
        assert (answer.content, answer.tool_calls) == ("rm -r ", [])


async def test_a_completion_continues_a_text(tmp_path: Path) -> None:
    """Any model continues texts, dialog-tuned ones too; calls are not looked for in them."""
    async with serving(tmp_path, *writing([b'{"name": "f", ', b'"parameters": {}}'])) as (provider, engine):
        request = completion(content=["two ", "parts\n"])
        answer = await whole_text(provider, request)
        assert answer == CompletionResponse(
            content='{"name": "f", "parameters": {}}', stop_reason=StopReason.FINISHED_OK
        )
        chunks = await streamed_text(provider, request)
        assert [chunk.text_delta for chunk in chunks] == ['{"name": "f", ', '"parameters": {}}', ""]
        assert chunks[-1].stop_reason is StopReason.FINISHED_OK
        to_the_end = await whole_text(provider, completion(content="x", max_tokens=0))
        assert to_the_end.stop_reason is StopReason.MAX_TOKENS
        assert engine.free_blocks == engine.blocks


async def test_half_a_character_at_the_end_is_text_like_any_and_the_reason_comes_once_and_last(tmp_path: Path) -> None:
    """What is flushed when the answer was cut is a chunk of its own; a client that ends at the reason would lose it."""
    async with serving(tmp_path, *writing([b"a", b"\xe4"])) as (provider, _):
        for request in (completion(max_tokens=2), completion(max_tokens=2, logprobs=True)):
            chunks = await streamed_text(provider, request)
            assert [chunk.text_delta for chunk in chunks] == ["a", "\ufffd", ""]
            assert [chunk.stop_reason for chunk in chunks] == [
                *[StopReason.NOT_STOPPED] * 2, StopReason.MAX_TOKENS
            ]  # fmt: skip


async def test_logprobs_are_the_same_streamed_and_whole_and_only_when_asked(tmp_path: Path) -> None:
    """One shape (spec rule G13): four lists of one length, offsets in characters, readable names for all tokens."""
    pieces = [b"Hi ", "é".encode()[:1], "é".encode()[1:], b"!"]
    async with serving(tmp_path, *writing(pieces)) as (provider, _):
        request = completion(logprobs=True)
        answer = await whole_text(provider, request)
        scores = cast(dict[str, Any], answer.logprobs)
        assert scores["tokens"] == ["Hi ", "bytes:\\xc3", "bytes:\\xa9", "!"]
        assert scores["text_offset"] == [0, 3, 3, 4]
        assert all(-0.01 < score <= 0 for score in scores["token_logprobs"])
        assert [best[token] for best, token in zip(scores["top_logprobs"], scores["tokens"], strict=True)] == (
            scores["token_logprobs"]
        )
        assert {len(best) for best in scores["top_logprobs"]} == {5}
        chunks = await streamed_text(provider, request)
        joined: dict[str, list[Any]] = {key: [] for key in scores}
        for chunk in chunks:
            for key, values in cast(dict[str, list[Any]], chunk.logprobs).items():
                joined[key] += values
        assert joined == scores
        assert (await whole(provider, chat(logprobs=True))).logprobs == scores
        assert (await whole_text(provider, completion())).logprobs is None
        assert all(chunk.logprobs is None for chunk in await streamed_text(provider, completion()))


async def test_batches_answer_in_the_order_of_the_request(tmp_path: Path) -> None:
    """Lines carry no index, so their order is all that tells a client which is whose; each equals the single answer."""
    tokenizer = byte_tokenizer()
    alphabet = lookup_llama({letter: letter + 1 for letter in range(ord("a"), ord("z"))}, tokenizer.vocab_size)
    sampled = SamplingParams(strategy=SamplingStrategy.TOP_P, temperature=3.0, top_p=1.0, seed=4)
    async with serving(tmp_path, tokenizer, alphabet, max_sequences=3) as (provider, engine):
        texts: list[Content] = [chr(ord("a") + index) for index in range(20)]
        for sampling in (SamplingParams(), sampled):
            fields: dict[str, Any] = {"sampling_params": sampling, "max_tokens": 5}
            batch = BatchCompletionRequest(model="m", content_batch=texts, **fields)
            lines = [line async for line in await provider.batch_completion(batch)]
            assert lines == [await whole_text(provider, completion(content=text, **fields)) for text in texts]
            assert len({str(line.content) for line in lines}) == 20
        empty = BatchCompletionRequest(model="m", content_batch=[])
        assert [line async for line in await provider.batch_completion(empty)] == []
        assert engine.free_blocks == engine.blocks
    tools = [WEATHER, ToolDefinition(tool_name="other")]
    call = [b'{"name": "get_weather", ', b'"parameters": {}}']
    async with serving(tmp_path, *writing(call), max_sequences=3) as (provider, _):
        chats = BatchChatCompletionRequest(model="m", batch_dialogs=[dialog()] * 5, available_tools=tools)
        answers = [answer async for answer in await provider.batch_chat_completion(chats)]
        assert answers == [await whole(provider, chat(available_tools=tools))] * 5
        assert answers[0].tool_calls


def endless(context: int = 256) -> tuple[Tokenizer, Llama]:
    tokenizer = byte_tokenizer()
    return tokenizer, lookup_llama({ord("\n"): ord("\n")}, tokenizer.vocab_size, context)


async def drain(stream: AsyncIterator[Any]) -> None:
    async for _ in stream:
        pass


async def settle(engine: Engine, provider: MetaReferenceInference) -> None:
    """Let one more request through, which comes after all cancellations have been seen."""
    await whole_text(provider, completion(max_tokens=1))
    assert engine.free_blocks == engine.blocks
    assert engine.waiting == 0


async def test_closing_a_stream_or_a_batch_stops_its_work(tmp_path: Path) -> None:
    """Begun or not, closed or just dropped: the places in the engine are free again at once."""
    async with serving(tmp_path, *endless()) as (provider, engine):
        for begun in (0, 3):
            stream = cast(Any, await provider.chat_completion(chat(stream=True)))
            for _ in range(begun):
                await anext(stream)
            await stream.aclose()
            await settle(engine, provider)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        batch = cast(Any, await provider.batch_completion(BatchCompletionRequest(model="m", content_batch=["\n"] * 50)))
        await anext(batch)
        await batch.aclose()
        await settle(engine, provider)
        dropped = await provider.completion(completion(stream=True))
        del dropped
        await settle(engine, provider)


async def test_cancelling_a_call_stops_its_work(tmp_path: Path) -> None:
    """A client that waits for a whole reply and leaves must not leave its work behind."""
    async with serving(tmp_path, *endless()) as (provider, engine):
        steps = engine.steps
        call = asyncio.create_task(provider.chat_completion(chat()))
        while engine.steps < steps + 2:
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await settle(engine, provider)


async def test_an_unknown_model_is_answered_with_the_names_that_are_served(tmp_path: Path) -> None:
    """Model names are guesswork otherwise."""
    async with serving(tmp_path, *endless()) as (provider, _):
        with pytest.raises(
            ModelNotFoundError, match=r"'llama3_8' is not served here; served: .*; did you mean 'llama3_8b'\?"
        ):
            await provider.completion(completion(model="llama3_8"))
        assert await provider.owns("llama3_8b")
        assert not await provider.owns("llama3_70b")


async def test_an_alias_answers_as_its_model(tmp_path: Path) -> None:
    """The draft's clients know only the draft's names."""
    async with serving(tmp_path, *writing([b"yes"])) as (provider, _):
        assert (await whole_text(provider, completion(model="llama3_8b"))).content == "yes"
        served = {model.model: model for model in await provider.models()}
        assert served["llama3_8b"].alias_of == "m"
        assert served["m"].alias_of is None
        assert served["m"].device == "cpu"
        assert served["m"].context_tokens == 1024
        assert served["m"].metadata["layout"] == "hugging_face"


@pytest.mark.parametrize("tokens", [256, 257, 5000])
async def test_a_prompt_that_does_not_fit_is_refused_with_both_counts(tmp_path: Path, tokens: int) -> None:
    """Nothing is cut in silence. A prompt of context - 1 tokens still has room for one."""
    async with serving(tmp_path, *endless()) as (provider, engine):
        with pytest.raises(ContextLengthError) as refused:
            await provider.completion(completion(content="x" * (tokens - 1)))
        assert refused.value.extra == {"prompt_tokens": tokens, "context_tokens": 256}
        assert refused.value.faults[0].pointer == "/content"
        fits = await whole_text(provider, completion(content="x" * 254))
        assert len(cast(str, fits.content)) <= 1
        assert engine.free_blocks == engine.blocks


TWO_IMAGES = dialog(
    ["look", IMAGE],
    Message.user("before"),
    Message.assistant(tool_calls=[ToolCall(tool_name="f", arguments={})]),
    Message.tool([ToolResponse(tool_name="f", content="x"), ToolResponse(tool_name="f", content=[IMAGE])]),
)
MISPLACED = dialog(
    "hi",
    Message(role=Role.USER, content="", tool_calls=[ToolCall(tool_name="f", arguments={})]),
    Message(role=Role.ASSISTANT, content="", tool_responses=[ToolResponse(tool_name="f", content="x")]),
)


@pytest.mark.parametrize(
    ("operation", "request_", "pointers"),
    [
        ("completion", completion(content=IMAGE), ["/content"]),
        ("completion", completion(content=["a", IMAGE, IMAGE]), ["/content/1", "/content/2"]),
        (
            "chat_completion",
            chat(dialog=TWO_IMAGES),
            ["/dialog/message_history/2/tool_responses/1/content/0", "/dialog/message/content/1"],
        ),
        (
            "chat_completion",
            chat(dialog=MISPLACED, stream=True),
            ["/dialog/message_history/0/tool_calls", "/dialog/message_history/1/tool_responses"],
        ),
        ("batch_completion", BatchCompletionRequest(model="m", content_batch=["a", IMAGE]), ["/content_batch/1"]),
        (
            "batch_completion",
            BatchCompletionRequest(model="m", content_batch=["a", "x" * 300, "x" * 400]),
            ["/content_batch/1"],
        ),
        (
            "batch_chat_completion",
            BatchChatCompletionRequest(model="m", batch_dialogs=[dialog(), dialog(IMAGE)]),
            ["/batch_dialogs/1/message/content"],
        ),
    ],
)
async def test_what_a_text_model_cannot_read_is_refused_by_its_place(
    tmp_path: Path, operation: str, request_: Any, pointers: list[str]
) -> None:
    """A batch is checked whole before any work; every fault is named by a pointer into the body that was sent."""
    async with serving(tmp_path, *endless()) as (provider, engine):
        with pytest.raises(InvalidRequestError) as refused:
            await getattr(provider, operation)(request_)
        assert [fault.pointer for fault in refused.value.faults] == pointers
        assert engine.steps == 0


async def test_a_built_in_call_that_the_tokenizer_cannot_write_is_the_requests_fault(tmp_path: Path) -> None:
    """Llama 3.0 has no <|python_tag|>: a history that needs it is refused, and points at the dialog."""
    tokenizer, model = endless()
    older = Tokenizer(
        lambda text: list(text.encode()),
        {byte: bytes([byte]) for byte in range(256)},
        {name: token for name, token in tokenizer.specials.items() if name != PYTHON_TAG},
    )
    called = Message.assistant(tool_calls=[ToolCall(tool_name="math", arguments={"query": "1+1"})])
    async with serving(tmp_path, older, model) as (provider, _):
        with pytest.raises(InvalidRequestError, match="python_tag") as refused:
            await provider.chat_completion(chat(dialog=dialog("hi", called)))
        assert refused.value.faults[0].pointer == "/dialog"


async def test_a_full_queue_refuses_before_anything_is_streamed(tmp_path: Path) -> None:
    """An error before the first byte keeps its real status, for a stream too."""
    async with serving(tmp_path, *endless(), max_sequences=1, queue_size=1) as (provider, engine):
        streams = [cast(Any, await provider.chat_completion(chat(stream=True))) for _ in range(2)]
        with pytest.raises(OverloadedError):
            await provider.chat_completion(chat(stream=True))
        for stream in streams:
            await stream.aclose()
        assert (await whole_text(provider, completion(max_tokens=1))).content == "\n"
        assert engine.free_blocks == engine.blocks


async def test_an_engine_fault_in_a_stream_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream that breaks says so, with an error that a client may retry, and never just ends."""
    tokenizer, model = endless()
    async with serving(tmp_path, tokenizer, model) as (provider, engine):
        stream = cast(Any, await provider.chat_completion(chat(stream=True)))
        await anext(stream)
        with torch.no_grad():
            model.norm.weight.fill_(torch.nan)
        with pytest.raises(EngineRestartedError) as failed:
            await drain(stream)
        assert failed.value.retriable
        batch = await provider.batch_completion(BatchCompletionRequest(model="m", content_batch=["a"] * 9))
        with pytest.raises(EngineRestartedError):
            await anext(batch)
        with torch.no_grad():
            model.norm.weight.fill_(1.0)
        await settle(engine, provider)
    assert "not finite" in caplog.text


class HeldTokenizer(Tokenizer):
    """Bytes as tokens; holds back the encoding of long texts until it is released."""

    def __init__(self) -> None:
        super().__init__(self._encode_bytes, {byte: bytes([byte]) for byte in range(256)}, SPECIALS)
        self.entered = threading.Event()
        self.released = threading.Event()

    def _encode_bytes(self, text: str) -> list[int]:
        if len(text) > 10_000:
            self.entered.set()
            assert self.released.wait(timeout=30)
        return list(text.encode())


@pytest.mark.parametrize(("long_prompts", "characters"), [(1, 20_000), (30, 200_000)])
async def test_others_are_answered_while_long_prompts_are_encoded(
    tmp_path: Path, long_prompts: int, characters: int
) -> None:
    """A prompt of megabytes takes seconds to encode: neither the event loop nor all threads may wait for it."""
    tokenizer = HeldTokenizer()
    async with serving(tmp_path, tokenizer, endless(context=1024)[1]) as (provider, _):
        request = completion(content="x" * characters)
        long = [asyncio.create_task(provider.completion(request)) for _ in range(long_prompts)]
        with_tools = await whole(provider, chat(available_tools=[WEATHER], max_tokens=1))
        assert with_tools.stop_reason is StopReason.MAX_TOKENS
        assert not any(task.done() for task in long)
        tokenizer.released.set()
        assert {type(error) for error in await asyncio.gather(*long, return_exceptions=True)} == {ContextLengthError}


async def test_stopping_refuses_the_prompts_that_wait_to_be_encoded(tmp_path: Path) -> None:
    """A stop waits for one prompt at most, and every client learns what happened."""
    tokenizer, encoder = HeldTokenizer(), PromptEncoder()
    async with serving(tmp_path, tokenizer, endless()[1], encoder=encoder) as (provider, _):
        request = completion(content="x" * 200_000)
        calls = [asyncio.create_task(provider.completion(request)) for _ in range(5)]
        assert await asyncio.to_thread(tokenizer.entered.wait, 30)
        closing = asyncio.create_task(encoder.close())
        await asyncio.sleep(0)
        with pytest.raises(DrainingError):
            await provider.completion(completion())
        tokenizer.released.set()
        await closing
        ends = [type(error) for error in await asyncio.gather(*calls, return_exceptions=True)]
        assert ends == [ContextLengthError, *[DrainingError] * 4]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("long prompts")]


def sent(value: BaseModel) -> Any:
    """What goes over the wire."""
    return json.loads(value.model_dump_json(exclude_none=True))


async def test_every_reply_is_valid_under_the_drafts_own_schemas(tmp_path: Path) -> None:
    """Clients in the field were generated from that file."""
    schemas = DraftSchemas()
    pieces = [b"Hi", "é".encode()[:1], "é".encode()[1:], b'\n{"name": "get_weather", "parameters": {"city": "Oslo"}}']
    async with serving(tmp_path, *writing(pieces)) as (provider, _):
        for logprobs in (False, True):
            request = completion(model="llama3_8b", logprobs=logprobs)
            schemas.check_reply("POST /inference/completion", sent(await whole_text(provider, request)))
            for chunk in await streamed_text(provider, request):
                schemas.check_reply("POST /inference/completion", sent(chunk), chunk=True)
            asked = chat(available_tools=[WEATHER], logprobs=logprobs)
            answer = await whole(provider, asked)
            assert answer.tool_calls
            schemas.check_reply("POST /inference/chat_completion", sent(answer))
            for piece in await streamed(provider, asked):
                schemas.check_reply("POST /inference/chat_completion", sent(piece), chunk=True)
        texts = BatchCompletionRequest(model="m", content_batch=["a\n", "b\n"], logprobs=True)
        async for line in await provider.batch_completion(texts):
            schemas.check_reply("POST /inference/batch_completion", sent(line))
        dialogs = BatchChatCompletionRequest(model="m", batch_dialogs=[dialog()], available_tools=[WEATHER])
        async for reply in await provider.batch_chat_completion(dialogs):
            schemas.check_reply("POST /inference/batch_chat_completion", sent(reply))


async def test_odd_texts_are_answered(tmp_path: Path) -> None:
    """Empty, invisible, or made to look like a special token: text is text."""
    async with serving(tmp_path, *endless()) as (provider, _):
        odd: list[Content] = ["", [], [""], "\x00", "\ufffd", "<|eot_id|>" * 9, "\u202e" * 40]
        for content in odd:
            assert await provider.completion(completion(content=content, max_tokens=1))
            assert await provider.chat_completion(chat(dialog=dialog(content), max_tokens=1))


async def test_the_figures_of_each_engine_are_given_to_prometheus(tmp_path: Path) -> None:
    """Under the model's name, never under its aliases, which would count everything twice."""
    async with serving(tmp_path, *writing([b"one", b"two"])) as (provider, _):
        await whole_text(provider, completion())
        found = {metric.name: metric for metric in provider.prometheus_metrics()}
    (sample,) = found["llama_stack_engine_generated_tokens"].samples
    assert (sample.labels, sample.value) == ({"model": "m"}, 2)

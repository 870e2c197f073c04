"""The chat format against prompts written by hand, tokenized by the libraries and not by our code."""

from __future__ import annotations

import base64
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from llama_stack_meta_reference.llama.chat_format import ChatFormat
from llama_stack_meta_reference.llama.tokenizer import (
    SPLIT_PATTERN,
    Tokenizer,
    load_meta,
    load_tokenizer,
    special_token_names,
)
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerFast

from llama_stack.apis.common import Attachment, Json, Message, Role, ToolCall, ToolDefinition, ToolResponse
from llama_stack.errors import CheckpointError, InvalidRequestError
from tests.providers.meta_reference.small_tokenizer import write_hugging_face, write_meta

GOLDEN: dict[str, dict[str, Any]] = {
    golden["name"]: golden for golden in json.loads(Path(__file__).with_name("golden_dialogs.json").read_text("utf-8"))
}
"""Dialogs and the exact prompts they make. In a prompt, ``<\\|`` stands for a ``<|`` that somebody wrote as text."""

MESSAGES = TypeAdapter(list[Message])
TOOLS = TypeAdapter(list[ToolDefinition])


def messages_of(golden: dict[str, Any]) -> list[Message]:
    empty: dict[str, Any] = {"tool_calls": [], "tool_responses": []}
    return MESSAGES.validate_json(json.dumps([empty | message for message in golden["messages"]]))


def tools_of(golden: dict[str, Any]) -> list[ToolDefinition]:
    empty: dict[str, Any] = {"input_shields": [], "output_shields": []}
    return TOOLS.validate_json(json.dumps([empty | tool for tool in golden["tools"]]))


def say(role: Role, content: str = "", *calls: ToolCall) -> Message:
    return Message(role=role, content=content, tool_calls=list(calls), tool_responses=[])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_hugging_face(folder)
    write_meta(folder)
    return folder


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def tokenizer(folder: Path, request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(folder / request.param)


@cache
def tiktoken_of(path: Path) -> tiktoken.Encoding:
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, path.read_text().splitlines())}
    specials = {name: len(ranks) + i for i, name in enumerate(special_token_names())}
    return tiktoken.Encoding("golden", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def ids_by_tiktoken(prompt: str, path: Path) -> list[int]:
    encoding = tiktoken_of(path)
    ids: list[int] = []
    for part in re.split(r"(<\|\w+\|>)", prompt):
        if part.startswith("<|"):
            ids.append(encoding.encode_single_token(part))
        else:
            ids += encoding.encode(part.replace("<\\|", "<|"), disallowed_special=())
    return ids


def ids_by_tokenizers(prompt: str, path: Path) -> list[int]:
    with_specials, without = (tokenizers.Tokenizer.from_file(str(path)) for _ in range(2))
    without.encode_special_tokens = True
    if "<\\|" not in prompt:
        whole: list[int] = with_specials.encode(prompt, add_special_tokens=False).ids
        return whole
    ids: list[int] = []
    for part in re.split(r"(<\|\w+\|>)", prompt):
        reader = with_specials if part.startswith("<|") else without
        ids += reader.encode(part.replace("<\\|", "<|"), add_special_tokens=False).ids
    return ids


def test_there_are_twenty_golden_dialogs_with_tools() -> None:
    """The set is what the format is held to; losing a part of it must not go unnoticed."""
    assert len(GOLDEN) == 30
    assert sum(bool(golden["tools"]) for golden in GOLDEN.values()) >= 20


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_dialog_makes_its_prompt_token_for_token(tokenizer: Tokenizer, folder: Path, name: str) -> None:
    """One wrong line break costs a real model quality without any error, so every token is compared."""
    golden = GOLDEN[name]
    ids = ChatFormat(tokenizer).encode_dialog(messages_of(golden), tools_of(golden))
    assert ids == ids_by_tiktoken(golden["prompt"], folder / "tokenizer.model")
    assert ids == ids_by_tokenizers(golden["prompt"], folder / "tokenizer.json")
    assert ids.count(tokenizer.specials["<|begin_of_text|>"]) == 1


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_dialog_reads_as_its_prompt(tokenizer: Tokenizer, name: str) -> None:
    """What docs and people are shown is what the model gets."""
    golden = GOLDEN[name]
    rendered = ChatFormat(tokenizer).render(messages_of(golden), tools_of(golden))
    assert rendered == golden["prompt"].replace("<\\|", "<|")


TEMPLATE = r"""
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
"""
"""The published format of plain turns, as transformers writes formats down."""

PLAIN = [
    name
    for name, golden in GOLDEN.items()
    if not golden["tools"]
    and "<\\|" not in golden["prompt"]
    and all(isinstance(m["content"], str) for m in golden["messages"])
]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_turns_are_those_of_transformers(tokenizer: Tokenizer, folder: Path, name: str) -> None:
    """Clients move between servers; the same chat must reach the same weights as the same tokens."""
    reference = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers has no types here
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|begin_of_text|>", chat_template=TEMPLATE
    )
    golden = GOLDEN[name]
    text = reference.apply_chat_template(golden["messages"], tokenize=False)
    expected = reference(text, add_special_tokens=False)["input_ids"]
    assert ChatFormat(tokenizer).encode_dialog(messages_of(golden)) == expected


def test_a_completion_prompt_is_its_text_after_one_begin_of_text(tokenizer: Tokenizer) -> None:
    """Base models see the text as it is, spaces at the end included, and a written BOS is no second one."""
    chat = ChatFormat(tokenizer)
    bos = tokenizer.specials["<|begin_of_text|>"]
    assert chat.encode_completion(" The sky \n") == [bos, *tokenizer.encode(" The sky \n")]
    assert chat.encode_completion(["The", " sky"]) == [bos, *tokenizer.encode("The sky")]
    assert chat.encode_completion("<|begin_of_text|>x").count(bos) == 1


def test_prompt_and_reply_together_are_the_dialog(tokenizer: Tokenizer) -> None:
    """Training puts the loss on the reply; if its tokens were not those of the dialog, serving would differ from it."""
    chat = ChatFormat(tokenizer)
    for golden in GOLDEN.values():
        messages, tools = messages_of(golden), tools_of(golden)
        whole = chat.encode_dialog(messages, tools)
        for index, message in enumerate(messages):
            if message.role is Role.ASSISTANT:
                sample = chat.encode_dialog(messages[:index], tools) + chat.encode_reply(message, tools)
                assert whole[: len(sample)] == sample


def test_messages_one_by_one_are_the_dialog(tokenizer: Tokenizer) -> None:
    """A caller that grows a dialog message by message must arrive at the same tokens."""
    chat = ChatFormat(tokenizer)
    messages = messages_of(GOLDEN["several turns"])
    grown = [tokenizer.specials["<|begin_of_text|>"]]
    for message in messages:
        grown += chat.encode_message(message)
    whole = chat.encode_dialog(messages)
    assert whole[: len(grown)] == grown
    assert tokenizer.decode(whole[len(grown) :]) == "assistant\n\n"


PICTURE = Attachment(url="https://example.org/cat.png", mime_type="image/png")


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([say(Role.USER, "x"), Message(role=Role.USER, content=PICTURE, tool_calls=[], tool_responses=[])],
         "message 1, part 0 is an attachment (image/png)"),
        ([Message(role=Role.SYSTEM, content=["x", PICTURE], tool_calls=[], tool_responses=[])],
         "message 0, part 1 is an attachment (image/png)"),
        ([Message(role=Role.TOOL, content="", tool_calls=[],
                  tool_responses=[ToolResponse(tool_name="f", content=content) for content in ("x", PICTURE)])],
         "message 0, tool response 1, part 0 is an attachment"),
        ([say(Role.USER, "x", ToolCall(tool_name="f", arguments={}))], "message 0 has tool_calls and role 'user'"),
        ([say(Role.SYSTEM, "x", ToolCall(tool_name="f", arguments={}))], "message 0 has tool_calls and role 'system'"),
        ([say(Role.TOOL, "x", ToolCall(tool_name="f", arguments={}))], "message 0 has tool_calls and role 'tool'"),
        ([Message(role=Role.ASSISTANT, content="x", tool_calls=[],
                  tool_responses=[ToolResponse(tool_name="f", content="x")])],
         "message 0 has tool_responses and role 'assistant'"),
    ],
)  # fmt: skip
def test_what_a_text_model_cannot_be_told_is_refused_with_its_place(
    tokenizer: Tokenizer, messages: list[Message], place: str
) -> None:
    """Leaving out a picture or a call in silence would make the model answer another question."""
    with pytest.raises(InvalidRequestError, match=re.escape(place)):
        ChatFormat(tokenizer).encode_dialog(messages)


def test_a_built_in_call_that_its_notation_cannot_carry_is_written_as_a_function_call(tokenizer: Tokenizer) -> None:
    """Argument names come from clients; one that is no Python name must not break the notation or get lost."""
    chat = ChatFormat(tokenizer)
    refused: list[dict[str, Json]] = [{"a b": 1}, {"class": 1}, {"ﬁ": 1}]
    for arguments in refused:
        reply = say(Role.ASSISTANT, "", ToolCall(tool_name="web_search", arguments=arguments))
        assert tokenizer.special_name(chat.encode_reply(reply)[-1]) == "<|eot_id|>"
        assert json.dumps({"name": "web_search", "parameters": arguments}, ensure_ascii=False) in chat.render([reply])
    reply = say(Role.ASSISTANT, "", ToolCall(tool_name="code_interpreter", arguments={"code": "1", "timeout": 2}))
    assert '{"name": "code_interpreter", "parameters": {"code": "1", "timeout": 2}}' in chat.render([reply])


def test_a_first_generation_tokenizer_chats_and_refuses_built_in_calls(folder: Path) -> None:
    """Llama 3.0 has no <|python_tag|>; writing some other token in its place would be a different prompt in silence."""
    chat = ChatFormat(load_meta(folder / "tokenizer.model", release="3.0"))
    assert chat.encode_dialog([say(Role.USER, "hi")])
    with pytest.raises(InvalidRequestError, match=r"no <\|python_tag\|>.*Llama 3\.1 or later"):
        chat.encode_dialog([say(Role.ASSISTANT, "", ToolCall(tool_name="math", arguments={"query": "1"}))])


def test_a_first_generation_tokenizer_ends_every_function_call_with_its_turn(folder: Path) -> None:
    """It knows no <|eom_id|>: a dialog whose tools include a built-in one must not fail at its second turn."""
    tokenizer = load_meta(folder / "tokenizer.model", release="3.0")
    call = say(Role.ASSISTANT, "", ToolCall(tool_name="get_time", arguments={}))
    tools = [ToolDefinition(tool_name=name) for name in ("web_search", "get_time")]
    assert tokenizer.special_name(ChatFormat(tokenizer).encode_reply(call, tools)[-1]) == "<|eot_id|>"


def test_a_tokenizer_without_headers_is_refused_by_name() -> None:
    """A base tokenizer of another family must fail at load, not write prompts that its model cannot read."""
    with pytest.raises(CheckpointError, match=r"no <\|start_header_id\|>, <\|end_header_id\|>, <\|eot_id\|>"):
        ChatFormat(Tokenizer(lambda text: [], {0: b"a"}, {"<|begin_of_text|>": 1}))

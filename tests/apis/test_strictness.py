"""What a schema refuses and what it reads: JSON is taken at its word, and every size has a bound."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from llama_stack.apis import APIS, operations
from llama_stack.apis.agentic_system import (
    AgenticSystemCreateRequest,
    AgenticSystemTurn,
    MemoryRetrievalStep,
    ModelInferenceStep,
    SafetyFilteringStep,
    Step,
    ToolExecutionStep,
)
from llama_stack.apis.common import (
    MAX_CHARACTERS,
    MAX_ITEMS,
    URL,
    Attachment,
    Base64,
    Dialog,
    Id,
    JsonObject,
    Message,
    Role,
    SamplingParams,
    Schema,
    ToolCall,
    ToolResponse,
)
from llama_stack.apis.datasets import Dataset
from llama_stack.apis.inference import ChatCompletionRequest, CompletionRequest, CompletionResponse
from llama_stack.apis.memory_banks import MemoryBankDocument, QueryRequest
from llama_stack.apis.post_training import (
    DoraFinetuningConfig,
    DPOAlignmentConfig,
    LoraFinetuningConfig,
    PostTrainingJobStatusResponse,
    PostTrainingSFTRequest,
    TrainingConfig,
)
from llama_stack.apis.reward_scoring import ScoredMessage

COMPLETION = {"content": "Once", "model": "tiny"}
AGENT: dict[str, Any] = {
    "uuid": "a",
    "instructions": "",
    "model": "tiny",
    "available_tools": [{"tool_name": "math"}],
    "executable_tools": ["math"],
    "memory_bank_uuids": [],
    "input_shields": [],
    "output_shields": [],
}
TRAINING = {
    "n_epochs": 1,
    "batch_size": 1,
    "shuffle": True,
    "n_iters": 0,
    "enable_activation_checkpointing": False,
    "memory_efficient_fsdp_wrap": False,
    "fsdp_cpu_offload": False,
}
DPO = {"reward_scale": 0.1, "reward_clip": 0, "epsilon": 0, "gamma": 0}
DOCUMENT = {"uuid": "d", "content": "aGk=", "metadata": {}, "mime_type": "text/plain"}
STATUS = {"job_uuid": "j", "status": "running", "checkpoints": []}


def schemas(base: type[Schema] = Schema) -> Iterator[type[Schema]]:
    for schema in base.__subclasses__():
        if schema.__module__.startswith("llama_stack.apis"):
            yield schema
            yield from schemas(schema)


def faults(kind: Any, text: str) -> list[tuple[str | int, ...]]:
    """Where the JSON text is refused; empty when it is read."""
    try:
        TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        return [fault["loc"] for fault in error.errors()]
    return []


REFUSED: list[tuple[str, Any, Any, str]] = [
    ("false is not 0", CompletionRequest, COMPLETION | {"max_tokens": False}, "max_tokens"),
    ("true is not 1", TrainingConfig, TRAINING | {"n_epochs": True}, "n_epochs"),
    ("0 is not false", CompletionRequest, COMPLETION | {"stream": 0}, "stream"),
    ("'true' is not true", CompletionRequest, COMPLETION | {"stream": "true"}, "stream"),
    ("'1' is not 1", CompletionRequest, COMPLETION | {"max_tokens": "1"}, "max_tokens"),
    ("1.5 is no count", CompletionRequest, COMPLETION | {"max_tokens": 1.5}, "max_tokens"),
    ("true is no number", SamplingParams, {"temperature": True}, "temperature"),
    ("'0.5' is no number", SamplingParams, {"temperature": "0.5"}, "temperature"),
    ("5 is no text", CompletionRequest, COMPLETION | {"model": 5}, "model"),
    ("a negative count", CompletionRequest, COMPLETION | {"max_tokens": -1}, "max_tokens"),
    ("a negative temperature", SamplingParams, {"temperature": -0.1}, "temperature"),
    ("top_p above 1", SamplingParams, {"top_p": 1.01}, "top_p"),
    ("a negative top_k", SamplingParams, {"top_k": -1}, "top_k"),
    ("an unknown strategy", SamplingParams, {"strategy": "beam"}, "strategy"),
    ("a seed over 63 bits", SamplingParams, {"seed": 2**63}, "seed"),
    ("an unknown role", Message, {"role": "robot", "content": ""}, "role"),
    ("a role in capitals", Message, {"role": "User", "content": ""}, "role"),
    ("null for a field that may be absent", CompletionResponse, {"content": "", "stop_reason": None}, "stop_reason"),
    ("null for a field with a default", CompletionRequest, COMPLETION | {"max_tokens": None}, "max_tokens"),
    ("null for a list", Dialog, {"message": {"role": "user", "content": ""}, "message_history": None}, "message"),
    ("null for content", Message, {"role": "user", "content": None}, "content"),
    ("an unknown key", CompletionRequest, COMPLETION | {"max_token": 5}, "max_token"),
    ("an unknown key deep inside", CompletionRequest, COMPLETION | {"sampling_params": {"n": 2}}, "sampling_params"),
    ("a missing key", CompletionRequest, {"content": ""}, "model"),
    ("an empty id", CompletionRequest, COMPLETION | {"model": ""}, "model"),
    ("an id of 256 characters", CompletionRequest, COMPLETION | {"model": "x" * 256}, "model"),
    ("an id with NUL", CompletionRequest, COMPLETION | {"model": "a\0b"}, "model"),
    ("an id that ends its line", CompletionRequest, COMPLETION | {"model": "a\n"}, "model"),
    ("an id with DEL", CompletionRequest, COMPLETION | {"model": "a\x7f"}, "model"),
    ("base64 with a stranger in it", MemoryBankDocument, DOCUMENT | {"content": "aG*="}, "content"),
    ("base64 without its padding", MemoryBankDocument, DOCUMENT | {"content": "aGk"}, "content"),
    ("base64 for URLs", MemoryBankDocument, DOCUMENT | {"content": "-_-_"}, "content"),
    ("base64 with a line break", MemoryBankDocument, DOCUMENT | {"content": "aGk=\n"}, "content"),
    ("base64 that is a number", MemoryBankDocument, DOCUMENT | {"content": 5}, "content"),
    ("too much base64", MemoryBankDocument, DOCUMENT | {"content": "A" * (MAX_CHARACTERS + 4)}, "content"),
    ("too long a text", Message, {"role": "user", "content": "x" * (MAX_CHARACTERS + 1)}, "content"),
    ("too long a list", AgenticSystemCreateRequest, AGENT | {"memory_bank_uuids": ["b"] * (MAX_ITEMS + 1)}, "memory"),
    ("too many keys", MemoryBankDocument, DOCUMENT | {"metadata": dict.fromkeys(map(str, range(10_001)))}, "metadata"),
    ("duplicates in a set", AgenticSystemCreateRequest, AGENT | {"executable_tools": ["math"] * 2}, "executable_tools"),
    ("an executable tool that is not available", AgenticSystemCreateRequest, AGENT | {"executable_tools": ["x"]}, ""),
    ("a URL of another scheme", Attachment, {"url": "ftp://h/x", "mime_type": "text/plain"}, "url"),
    ("a URL after a space", Attachment, {"url": " http://h/x", "mime_type": "text/plain"}, "url"),
    ("an unknown kind of column", Dataset, {"columns": {"a": "blob"}, "content_url": "data:,", "metadata": {}}, "col"),
    ("no k at all", QueryRequest, {"bank_uuid": "b", "k": 0}, "k"),
    ("a batch of none", TrainingConfig, TRAINING | {"batch_size": 0}, "batch_size"),
    ("beta of zero", DPOAlignmentConfig, DPO | {"reward_scale": 0}, "reward_scale"),
    ("label smoothing of a half", DPOAlignmentConfig, DPO | {"epsilon": 0.5}, "epsilon"),
    ("a time without its zone", PostTrainingJobStatusResponse, STATUS | {"started_at": "2024-07-23T10:00:00"}, "start"),
    ("a time as a number", PostTrainingJobStatusResponse, STATUS | {"started_at": 1721728800}, "started_at"),
]


@pytest.mark.parametrize(("kind", "value", "where"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_is_refused_there_and_nowhere_else(kind: Any, value: dict[str, Any], where: str) -> None:
    """A value that is nearly right is a mistake of the caller's, and guessing would hide it."""
    found = faults(kind, json.dumps(value))
    assert found
    assert {str(loc[0]).startswith(where) if loc else where == "" for loc in found} == {True}


READ: list[tuple[str, Any, Any]] = [
    ("1 is a number", SamplingParams, {"temperature": 1}),
    ("an id in any script, with spaces and slashes", CompletionRequest, COMPLETION | {"model": "../Größe 1/模型"}),
    ("an id of 255 characters", CompletionRequest, COMPLETION | {"model": "x" * 255}),
    ("the draft's own model name", CompletionRequest, COMPLETION | {"model": "llama3_8b"}),
    ("an empty text", CompletionRequest, COMPLETION | {"content": ""}),
    ("a list of content", CompletionRequest, COMPLETION | {"content": ["a", {"url": "data:,b", "mime_type": "t"}]}),
    ("null inside a free object", MemoryBankDocument, DOCUMENT | {"metadata": {"a": None, "b": [None, {"c": None}]}}),
    ("an empty document", MemoryBankDocument, DOCUMENT | {"content": ""}),
    ("a time in UTC", PostTrainingJobStatusResponse, STATUS | {"started_at": "2024-07-23T10:00:00Z"}),
]


@pytest.mark.parametrize(("kind", "value"), [row[1:] for row in READ], ids=[row[0] for row in READ])
def test_is_read(kind: Any, value: dict[str, Any]) -> None:
    """Strict is not narrow: what the draft allows is taken."""
    assert faults(kind, json.dumps(value)) == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_refused(number: str) -> None:
    """Python's JSON reads them; no other JSON parser would read our answer."""
    assert faults(SamplingParams, f'{{"temperature": {number}}}') == [("temperature",)]
    assert faults(ToolCall, f'{{"tool_name": "t", "arguments": {{"x": [1, {{"y": {number}}}]}}}}') == [("arguments",)]
    with pytest.raises(ValidationError):
        ScoredMessage(message=Message.user("x"), score=float(number))


def test_every_schema_is_strict_closed_and_frozen() -> None:
    """The rules come from the one base class; a subclass that loosens them shows here."""
    found = list(schemas())
    assert len(found) > 50
    for schema in found:
        config = schema.model_config
        assert (config["extra"], config["strict"], config["frozen"]) == ("forbid", True, True), schema
        assert config["allow_inf_nan"] is False
        assert schema.__doc__


def test_every_text_and_list_of_a_request_has_a_bound() -> None:
    """An unbounded field is memory that a stranger decides about."""
    for api in APIS:
        for operation in operations(api):
            for parameter in [*operation.query.values(), *([operation.body] if operation.body else [])]:
                schema = parameter.adapter.json_schema()
                for part in parts(schema):
                    if (
                        part.get("type") == "string"
                        and not {"enum", "const", "format", "contentEncoding"} & part.keys()
                    ):
                        assert "maxLength" in part or part == {"type": "string"}, (operation.key, part)
                    if part.get("type") == "array" and part.get("items"):
                        assert "maxItems" in part, (operation.key, part)


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema inside, except the words of the draft and the free JSON values, whose bound is their object's."""
    if isinstance(schema, list):
        for part in schema:
            yield from parts(part)
    elif isinstance(schema, dict) and {"type": "null"} not in schema.get("oneOf", []):
        yield schema
        for key, part in schema.items():
            if key != "x-draft":
                yield from parts(part)


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        ({"step_type": "model_inference", "uuid": "s", "text": "x"}, ModelInferenceStep),
        ({"step_type": "tool_execution", "uuid": "s", "tool_calls": [], "tool_responses": []}, ToolExecutionStep),
        ({"step_type": "safety_filtering", "uuid": "s"}, SafetyFilteringStep),
        ({"step_type": "memory_retrieval", "uuid": "s", "documents": [], "scores": []}, MemoryRetrievalStep),
        ({"uuid": "s", "text": "x"}, ModelInferenceStep),
        ({"uuid": "s", "tool_calls": [], "tool_responses": []}, ToolExecutionStep),
        ({"uuid": "s", "documents": [], "scores": []}, MemoryRetrievalStep),
        ({"uuid": "s"}, SafetyFilteringStep),
    ],
)
def test_a_step_is_told_by_its_type_or_else_by_its_keys(step: dict[str, Any], kind: type[Schema]) -> None:
    """Rules G1 and G5: the type has a default and may be absent; where it stands, it decides."""
    found = TypeAdapter[Any](Step).validate_json(json.dumps(step))
    assert type(found) is kind
    written = json.loads(TypeAdapter[Any](Step).dump_json(found, exclude_none=True))
    assert written["step_type"] == kind.model_fields["step_type"].default


@pytest.mark.parametrize(
    "step",
    [
        {"step_type": "tool_execution", "uuid": "s"},
        {"step_type": "safety_filtering", "uuid": "s", "text": "x"},
        {"step_type": "model_inference", "uuid": "s", "documents": [], "scores": []},
        {"step_type": "thinking", "uuid": "s"},
        {"step_type": None, "uuid": "s"},
        {"step_type": 5, "uuid": "s"},
        "model_inference",
        None,
    ],
)
def test_a_step_whose_shape_contradicts_its_type_is_refused(step: Any) -> None:
    """Rule G5: the draft alone would take a tool execution without tools for a safety step."""
    turn = {"user_messages": [], "steps": [step], "response_message": {"role": "assistant", "content": ""}}
    assert faults(AgenticSystemTurn, json.dumps(turn))


def test_a_step_cannot_be_built_with_the_type_of_another() -> None:
    """What we emit has the matching type only."""
    with pytest.raises(ValidationError):
        ModelInferenceStep.model_validate({"step_type": "tool_execution", "uuid": "s", "text": ""})


def test_what_the_draft_requires_with_a_default_may_be_absent_and_is_always_sent() -> None:
    """Rule G1."""
    request = ChatCompletionRequest.model_validate_json(
        '{"model": "tiny", "dialog": {"message": {"role": "user", "content": "Hi"}}}'
    )
    assert json.loads(request.model_dump_json(exclude_none=True)) == {
        "model": "tiny",
        "dialog": {
            "message": {"role": "user", "content": "Hi", "tool_calls": [], "tool_responses": []},
            "message_history": [],
        },
        "sampling_params": {"temperature": 0.0, "strategy": "greedy", "top_p": 0.95, "top_k": 0},
        "available_tools": [],
        "max_tokens": 0,
        "stream": False,
        "logprobs": False,
    }


def test_bytes_come_back_as_they_went() -> None:
    """Rule G17: exactly the bytes stored."""
    adapter = TypeAdapter[bytes](Base64)
    for data in (b"", b"\0\xff\n", bytes(range(256))):
        assert adapter.validate_json(adapter.dump_json(data)) == data
    assert adapter.dump_python(b"hi") == b"hi"


def test_ids_keep_every_character() -> None:
    """An id is opaque: no trimming, no folding, no normalisation."""
    for text in (" a ", "\u0041\u030a", "\u00c5", "e\u2028"):
        assert TypeAdapter[str](Id).validate_python(text) == text


def test_a_url_is_text_and_stays_as_written() -> None:
    """The fetcher judges it; a parser in between would see another URL."""
    for text in ("HTTP://x".lower(), "file:///a/../b", "data:,x%00", "http://a\\@b"):
        assert TypeAdapter[str](URL).validate_python(text) == text


def test_free_objects_keep_their_types() -> None:
    """Metadata that looks like anything else comes back as it was."""
    value = {"1": 1, "true": True, "f": 1.0, "big": 2**63, "null": None, "__class__": "os.system", "$ref": "#"}
    found = TypeAdapter[dict[str, Any]](JsonObject).validate_json(json.dumps(value))
    assert found == value
    assert [type(v) for v in found.values()] == [type(v) for v in value.values()]
    with pytest.raises(ValidationError):
        TypeAdapter[dict[str, Any]](JsonObject).validate_python({"x": math.nan})


def test_adapter_settings_are_one_schema_and_keep_the_callers_class() -> None:
    """Rule G4: ``algorithm`` tells three identical schemas apart; a fault is reported once, not three times."""
    settings = {"lora_attn_modules": ["q"], "apply_lora_to_mlp": False, "apply_lora_to_output": False, "rank": 4}
    dataset = {"columns": {"dialog": "dialog"}, "content_url": "data:,", "metadata": {}}
    body = {
        "job_uuid": "j",
        "model": "tiny",
        "dataset": dataset,
        "validation_dataset": dataset,
        "algorithm": "dora",
        "algorithm_config": settings | {"alpha": 8},
        "optimizer_config": {"optimizer_type": "adamw", "lr": 1e-3, "lr_min": 0, "weight_decay": 0},
        "training_config": TRAINING,
        "hyperparam_search_config": {},
        "logger_config": {},
    }
    request = PostTrainingSFTRequest.model_validate_json(json.dumps(body))
    assert type(request.algorithm_config) is LoraFinetuningConfig
    assert request.algorithm_config.alpha == 8
    assert len(faults(PostTrainingSFTRequest, json.dumps(body | {"algorithm_config": settings}))) == 1
    built = DoraFinetuningConfig.model_validate(settings | {"alpha": 8})
    assert type(request.model_validate(dict(request) | {"algorithm_config": built}).algorithm_config) is type(built)
    del body["algorithm_config"]
    assert PostTrainingSFTRequest.model_validate_json(json.dumps(body)).algorithm_config is None


def test_messages_are_built_by_who_speaks() -> None:
    """Tests, documents and clients read as the dialog does."""
    call = ToolCall(tool_name="math", arguments={"expression": "2+2"})
    answer = ToolResponse(tool_name="math", content="4")
    assert Message.system("Be brief.") == Message(role=Role.SYSTEM, content="Be brief.")
    assert Message.user("Hi") == Message(role=Role.USER, content="Hi")
    assert Message.assistant("Hello") == Message(role=Role.ASSISTANT, content="Hello")
    assert Message.assistant(tool_calls=[call]) == Message(role=Role.ASSISTANT, content="", tool_calls=[call])
    assert Message.tool([answer]) == Message(role=Role.TOOL, content="", tool_responses=[answer])
    dialog = Dialog(message=Message.user("b"), message_history=[Message.user("a")])
    assert [message.content for message in dialog.messages] == ["a", "b"]

"""The words that several contracts share: messages, content, tools, sampling, and the rules that hold for every schema.

A ``Schema`` is a value on the wire. It is strict (``false`` is not 0, ``"1"`` is not 1), refuses unknown keys and null,
and bounds every size. A field is required in the published document unless its default is ``None``; a field that the
draft requires and also gives a default may be left out of a request and is always sent in a reply (spec rule G1); we
read an absent list of tools, shields or earlier messages as an empty one in the same way.
What the draft lacks is marked ``EXTENSION``; what it words differently is given by ``draft(...)``.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    PlainSerializer,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import CoreSchema
from typing_extensions import TypeAliasType

T = TypeVar("T")

MAX_ITEMS = 10_000
"""The longest list, and the most keys of an object, that a request may carry, where a field does not say less."""
MAX_CHARACTERS = 16_777_216
"""The longest text, URL or base64 string that a request may carry; the server's body limit is usually smaller."""
MAX_TOKENS = 1_048_576
"""The largest ``max_tokens`` that a request may ask for; the model's own context bounds it further."""

EXTENSION = Field(json_schema_extra={"x-extension": True})
"""Marks a field or a parameter that the draft does not have; the draft's document leaves it out."""
ANY_OF = Field(json_schema_extra={"x-any-of": True})
"""Marks a union whose branches overlap, so that it is published as ``anyOf`` (spec rule G4)."""


def draft(*, required: bool = False, **schema: Any) -> Any:
    """State what the draft publishes for a field that is wider here: its whole schema, or that it is required."""
    return Field(json_schema_extra={"x-draft": {"required": required, "schema": schema}})


class _NullRefused:
    """Leaves ``null`` out of the published schema of a field that refuses it."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        published = handler(schema)
        choices = [choice for choice in published.get("anyOf", []) if choice != {"type": "null"}]
        return choices[0] if len(choices) == 1 else published | ({"anyOf": choices} if choices else {})


def _refuse_null(value: Any, info: ValidationInfo) -> Any:
    if value is None and info.mode == "json":
        raise ValueError("null is not a value here; leave the key out")
    return value


def _pause(item: Any) -> Any:
    """Nothing but a step of Python: validating a long list off the event loop lets go of the interpreter here."""
    return item


def _refuse_duplicates(values: list[Any]) -> list[Any]:
    if len(set(values)) != len(values):
        raise ValueError("the items must differ from one another")
    return values


def _refuse_non_finite(values: dict[str, Any]) -> dict[str, Any]:
    try:
        _FINITE_JSON.encode(values)
    except ValueError as error:
        raise ValueError("NaN and infinity are not JSON (RFC 8259 section 6)") from error
    return values


_FINITE_JSON = json.JSONEncoder(allow_nan=False)


def _decode_base64(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError("not a base64 string")
    if len(value) > MAX_CHARACTERS:
        raise ValueError(f"more than {MAX_CHARACTERS} characters of base64")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("not valid base64 (RFC 4648 section 4)") from error


Id = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]
"""An opaque id that the client chooses: 1 to 255 characters, none of them a control character (spec rule G10)."""
Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
"""Text of any usual length; it may be empty."""
Label = Annotated[str, Field(max_length=255)]
"""A short text, such as a media type."""
Maybe = Annotated[T | None, AfterValidator(_refuse_null), _NullRefused()]
"""A field that may be absent; JSON ``null`` is refused, for the draft's schemas do not allow it."""
Items = Annotated[list[Annotated[T, BeforeValidator(_pause)]], Field(max_length=MAX_ITEMS, fail_fast=True)]
"""A list of bounded length; validation stops at the first bad item."""
UniqueItems = Annotated[
    list[T], Field(max_length=MAX_ITEMS, json_schema_extra={"uniqueItems": True}), AfterValidator(_refuse_duplicates)
]
"""A list without duplicates, in the client's order (spec rule G17)."""
Base64 = Annotated[
    bytes,
    BeforeValidator(_decode_base64),
    PlainSerializer(lambda data: base64.b64encode(data).decode("ascii"), return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "maxLength": MAX_CHARACTERS}),
]
"""Bytes that travel as standard base64."""
Json = Annotated[
    JsonValue,
    WithJsonSchema(
        {"oneOf": [{"type": t} for t in ("null", "boolean", "number", "string")]
         + [{"type": "array", "items": {}}, {"type": "object"}]}
    ),
]  # fmt: skip
"""Any JSON value."""
JsonObject = Annotated[dict[str, Json], Field(max_length=MAX_ITEMS), AfterValidator(_refuse_non_finite)]
"""A JSON object that the stack stores or passes on and never interprets."""
_URL_PATTERN = r"^(https?://|file://|data:)"
URL = TypeAliasType(
    "URL",
    Annotated[
        str,
        StringConstraints(pattern=_URL_PATTERN, max_length=MAX_CHARACTERS, strict=True),
        Field(json_schema_extra={"format": "uri"}),
        draft(type="string", format="uri", pattern=_URL_PATTERN),
    ],
)
"""``http(s)://``, ``file://`` or ``data:``; what may be read is the distribution's to say (spec rule G15)."""


class Schema(BaseModel):
    """Base of everything on the wire."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    inline: ClassVar[bool] = False
    """Whether the draft writes this schema out in place instead of naming it as a component."""


class Choice(StrEnum):
    """Base of the draft's enumerations; the draft writes them out in place, some with a ``__title__``."""

    @classmethod
    def published(cls) -> dict[str, Any]:
        """The JSON Schema of the enumeration."""
        title = getattr(cls, "__title__", None)
        return {"type": "string", "enum": [member.value for member in cls]} | ({"title": title} if title else {})

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return cls.published()


class Attachment(
    Schema,
    title="Attachments are used to refer to external resources, such as images, videos, audio, etc.",
):
    """A resource by URL, with its media type."""

    url: URL
    mime_type: Label


Content = Text | Attachment | Items[Text | Attachment]
"""What a message says: text, an attachment, or several of both in order."""


class Role(Choice):
    """Who a message is from."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class StopReason(Choice):
    """Why a model stopped; ``not_stopped`` only in the middle of a stream."""

    __title__ = "Stop reasons are used to indicate why the model stopped generating text."

    NOT_STOPPED = "not_stopped"
    FINISHED_OK = "finished_ok"
    MAX_TOKENS = "max_tokens"


class BuiltinTool(Choice):
    """The tools that the Llama 3.1 family knows by name."""

    WEB_SEARCH = "web_search"
    MATH = "math"
    IMAGE_GEN = "image_gen"
    CODE_INTERPRETER = "code_interpreter"


class ToolCall(Schema, title="A tool call is a request to a tool."):
    """A call that the model wants made."""

    inline = True

    tool_name: Id
    arguments: JsonObject


class ToolResponse(Schema):
    """What a tool answered. Responses are matched to calls by tool name, then by order (spec rule G14)."""

    inline = True

    tool_name: Id
    content: Content


class ShieldConfig(Schema):
    """A shield to run, with the parameters that its own type defines."""

    shield_type: Annotated[
        Id,
        draft(type="string", enum=["llama_guard", "prompt_guard", "code_guard"], title="The type of safety shield."),
    ]
    params: JsonObject


class ToolDefinition(Schema):
    """A tool that the model may call."""

    inline = True

    tool_name: Annotated[Id, draft(anyOf=[BuiltinTool.published(), {"type": "string"}])]
    parameters: Maybe[JsonObject] = None
    """Each argument's name and its JSON Schema."""
    input_shields: Items[ShieldConfig] = Field(default_factory=list)
    output_shields: Items[ShieldConfig] = Field(default_factory=list)
    description: Annotated[Maybe[Annotated[str, Field(max_length=10_000)]], EXTENSION] = None
    """What the tool does, in words for the model."""


class Message(Schema):
    """One message of a dialog."""

    role: Role
    content: Content
    tool_calls: Items[ToolCall] = Field(default_factory=list)
    tool_responses: Items[ToolResponse] = Field(default_factory=list)

    @classmethod
    def system(cls, content: Content) -> Message:
        """Instructions to the model."""
        return cls(role=Role.SYSTEM, content=content)

    @classmethod
    def user(cls, content: Content) -> Message:
        """What a user says."""
        return cls(role=Role.USER, content=content)

    @classmethod
    def assistant(cls, content: Content = "", tool_calls: Sequence[ToolCall] = ()) -> Message:
        """What the model answered: text, calls of tools, or both."""
        return cls(role=Role.ASSISTANT, content=content, tool_calls=list(tool_calls))

    @classmethod
    def tool(cls, responses: Sequence[ToolResponse]) -> Message:
        """What tools answered."""
        return cls(role=Role.TOOL, content="", tool_responses=list(responses))


class Dialog(Schema):
    """The message to answer, and all that was said before it."""

    message: Message
    message_history: Items[Message] = Field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """History and message in the order in which they were said."""
        return [*self.message_history, self.message]


class SamplingStrategy(Choice):
    """How the next token is picked (spec rule G12)."""

    GREEDY = "greedy"
    TOP_P = "top_p"
    TOP_K = "top_k"


class SamplingParams(Schema):
    """How tokens are picked. A temperature of 0, a ``top_k`` of 0 and a ``top_p`` of 1 each switch that part off."""

    inline = True

    temperature: float = Field(default=0.0, ge=0, le=100)
    strategy: Annotated[SamplingStrategy, draft(type="string")] = SamplingStrategy.GREEDY
    top_p: float = Field(default=0.95, ge=0, le=1)
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    seed: Annotated[Maybe[Annotated[int, Field(ge=0, lt=2**63)]], EXTENSION] = None
    """Makes a sampled answer repeatable, whatever else is in the batch."""


MaxTokens = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
"""The most tokens to generate; 0 = to the end of the context (spec rule G12)."""
BaseModelName = Annotated[Id, draft(type="string", enum=["llama3_8b", "llama3_70b"])]
"""A base model that the distribution serves; the draft knows two logical names (spec rule G11)."""
ChatModelName = Annotated[Id, draft(type="string", enum=["llama3_8b_chat", "llama3_70b_chat"])]
"""A chat model that the distribution serves; the draft knows two logical names (spec rule G11)."""
RewardModelName = Annotated[Id, draft(type="string", enum=["llama3_405b_reward"])]
"""A reward model that the distribution serves; the draft knows one logical name (spec rule G11)."""

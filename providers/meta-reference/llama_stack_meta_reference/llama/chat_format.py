"""Llama 3.x prompts: a dialog and the tools at hand become the one token sequence that the model was trained on.

The format (model cards of Llama 3.1 to 3.3)::

    <|begin_of_text|>
    <|start_header_id|>ROLE<|end_header_id|>\\n\\nCONTENT<|eot_id|>      a message; role tool is written ipython
    <|start_header_id|>assistant<|end_header_id|>\\n\\n                 what the model continues

An assistant's tool calls are written as the model writes them itself: a function as ``{"name": ..., "parameters":
...}``, several of them separated by ``; `` (what Llama 3.1 to 3.3 do without being asked), a built-in tool as
``<|python_tag|>brave_search.call(query="...")<|eom_id|>``, code as ``<|python_tag|>CODE<|eom_id|>``. Where a
built-in tool is among several calls, each call has a ``<|python_tag|>`` of its own. Where built-in tools are at hand, a
function's call ends with ``<|eom_id|>`` too, as in the chat template that is published with Llama 3.1. ``tool_calls``
reads all of these back.

No date is written into the prompt, though the model cards show one: a prompt must not change with the clock.
"""

from __future__ import annotations

import json
import keyword
from collections.abc import Iterator, Sequence

from llama_stack.apis.common import Attachment, Content, Json, Message, ToolCall, ToolDefinition
from llama_stack.errors import CheckpointError, InvalidRequestError

from .tokenizer import SpecialToken, Tokenizer

CODE_INTERPRETER = "code_interpreter"
BUILT_IN_NAMES = {
    "web_search": "brave_search",
    "brave_search": "brave_search",
    "math": "wolfram_alpha",
    "wolfram_alpha": "wolfram_alpha",
    CODE_INTERPRETER: CODE_INTERPRETER,
}
"""The tools that Llama 3.x was trained to call unasked, by the names they have here: what the model calls each."""

BEGIN_OF_TEXT = SpecialToken("<|begin_of_text|>")
START_HEADER = SpecialToken("<|start_header_id|>")
END_HEADER = SpecialToken("<|end_header_id|>")
END_OF_TURN = SpecialToken("<|eot_id|>")
END_OF_MESSAGE = SpecialToken("<|eom_id|>")
PYTHON_TAG = SpecialToken("<|python_tag|>")

_FUNCTIONS = (
    "You have access to the following functions. To call a function, please respond with JSON for a function call. "
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. '
    "Do not use variables.\n\n"
)


class ChatFormat:
    """Encodes dialogs for one tokenizer. Every prompt starts with exactly one ``<|begin_of_text|>``.

    Raises ``CheckpointError`` when the tokenizer lacks a special token that every chat needs.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        missing = [
            name for name in (BEGIN_OF_TEXT, START_HEADER, END_HEADER, END_OF_TURN) if tokenizer.special(name) is None
        ]
        if missing:
            raise CheckpointError(f"the tokenizer has no {', '.join(missing)}; the Llama 3 chat format needs them")
        self._tokenizer = tokenizer

    def encode_dialog(self, messages: Sequence[Message], tools: Sequence[ToolDefinition] = ()) -> list[int]:
        """The prompt that makes the model write the assistant's next message.

        Raises ``InvalidRequestError``, naming the message, for what a text model cannot be told: attachments, tool
        calls of another role than assistant, tool responses of another role than tool.
        """
        return self._ids(_dialog(messages, tools, self._end_of_calls(tools)))

    def encode_message(self, message: Message, tools: Sequence[ToolDefinition] = ()) -> list[int]:
        """One message with its header and end, as it stands inside a dialog with ``tools``."""
        return self._ids(_message(message, 0, self._end_of_calls(tools)))

    def encode_reply(self, message: Message, tools: Sequence[ToolDefinition] = ()) -> list[int]:
        """What the model itself writes to say ``message``: an assistant's content, calls and end, without the header.

        ``encode_dialog(before, tools) + encode_reply(message, tools)`` is the sample to train on, its second part
        bearing the loss.
        """
        return self._ids(_body(message, 0, self._end_of_calls(tools)))

    def encode_completion(self, content: Content) -> list[int]:
        """A text to be continued, exactly as given, after ``<|begin_of_text|>``."""
        return self._ids((BEGIN_OF_TEXT, _text(content, "the content")))

    def render(self, messages: Sequence[Message], tools: Sequence[ToolDefinition] = ()) -> str:
        """The prompt of ``encode_dialog`` to be read by people, its special tokens spelled out.

        It is no input for a tokenizer: text that merely looks like a special token can no longer be told from one.
        """
        return "".join(_dialog(messages, tools, self._end_of_calls(tools)))

    def _end_of_calls(self, tools: Sequence[ToolDefinition]) -> SpecialToken:
        """What ends a message of function calls. The first Llama 3 knows no end of a message that is not its turn's."""
        has_built_in = any(tool.tool_name in BUILT_IN_NAMES for tool in tools)
        return END_OF_MESSAGE if has_built_in and self._tokenizer.special(END_OF_MESSAGE) is not None else END_OF_TURN

    def _ids(self, segments: Sequence[str] | Iterator[str]) -> list[int]:
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, SpecialToken):
                token = self._tokenizer.special(segment)
                if token is None:
                    raise InvalidRequestError(
                        f"this model's tokenizer has no {segment}, which calls of built-in tools are written with; "
                        "such calls need Llama 3.1 or later"
                    )
                ids.append(token)
            else:
                ids += self._tokenizer.encode(segment)
        return ids


def system_text(text: str, tools: Sequence[ToolDefinition]) -> str:
    """The system message that tells the model which tools it has, followed by the caller's own ``text``."""
    if not tools:
        return text.strip()
    written = "Environment: ipython\n"
    built_in = [BUILT_IN_NAMES[tool.tool_name] for tool in tools if tool.tool_name in BUILT_IN_NAMES]
    named = [name for name in dict.fromkeys(built_in) if name != CODE_INTERPRETER]
    if named:
        written += f"Tools: {', '.join(named)}\n"
    functions = [tool for tool in tools if tool.tool_name not in BUILT_IN_NAMES]
    if functions:
        written += "\n" + _FUNCTIONS + "".join(_function(tool) + "\n" for tool in functions)
    return f"{written}\n{text.strip()}".strip()


def _function(tool: ToolDefinition) -> str:
    described: dict[str, Json] = {"name": tool.tool_name}
    if tool.description:
        described["description"] = tool.description
    return _json({**described, "parameters": tool.parameters or {}})


def _dialog(messages: Sequence[Message], tools: Sequence[ToolDefinition], end_of_calls: SpecialToken) -> Iterator[str]:
    yield BEGIN_OF_TEXT
    starts_with_system = bool(messages) and messages[0].role == "system"
    if tools and not starts_with_system:
        yield from _header("system")
        yield system_text("", tools)
        yield END_OF_TURN
    for index, message in enumerate(messages):
        if index == 0 and starts_with_system:
            _check_role(message, index)
            yield from _header("system")
            yield system_text(_text(message.content, "message 0"), tools)
            yield END_OF_TURN
        else:
            yield from _message(message, index, end_of_calls)
    yield from _header("assistant")


def _header(role: str) -> Iterator[str]:
    yield START_HEADER
    yield role
    yield END_HEADER
    yield "\n\n"


def _message(message: Message, index: int, end_of_calls: SpecialToken) -> Iterator[str]:
    if message.role == "tool":
        _check_role(message, index)
        yield from _tool_message(message, index)
    else:
        yield from _header(message.role.value)
        yield from _body(message, index, end_of_calls)


def _tool_message(message: Message, index: int) -> Iterator[str]:
    """Each response is an ipython message of its own, after the message's own content where it has any."""
    texts = [_text(message.content, f"message {index}")]
    if message.tool_responses and not texts[0].strip():
        texts = []
    for position, response in enumerate(message.tool_responses):
        texts.append(_text(response.content, f"message {index}, tool response {position}"))
    for text in texts:
        yield from _header("ipython")
        yield text.strip()
        yield END_OF_TURN


def _body(message: Message, index: int, end_of_calls: SpecialToken) -> Iterator[str]:
    _check_role(message, index)
    text = _text(message.content, f"message {index}").strip()
    calls = message.tool_calls
    if any(_is_built_in(call) for call in calls):
        if text:
            yield text
        for call in calls:
            yield PYTHON_TAG
            yield write_call(call)
        yield END_OF_MESSAGE
    else:
        yield "\n".join(filter(None, (text, "; ".join(map(write_call, calls)))))
        yield end_of_calls if calls else END_OF_TURN


def write_call(call: ToolCall) -> str:
    """One call as the model writes it, without the special tokens around it."""
    if not _is_built_in(call):
        return _json({"name": call.tool_name, "parameters": call.arguments})
    if call.tool_name == CODE_INTERPRETER:
        return str(call.arguments["code"])
    arguments = ", ".join(f"{name}={_python(value)}" for name, value in call.arguments.items())
    return f"{BUILT_IN_NAMES[call.tool_name]}.call({arguments})"


def _is_built_in(call: ToolCall) -> bool:
    """Whether the built-in notation can carry the call: any other one is written as a function's."""
    if call.tool_name == CODE_INTERPRETER:
        return call.arguments.keys() == {"code"} and isinstance(call.arguments["code"], str)
    return call.tool_name in BUILT_IN_NAMES and all(map(_is_keyword_argument, call.arguments))


def _is_keyword_argument(name: str) -> bool:
    # Only ASCII: Python folds other letters into their compatibility forms, so they would not come back as they were.
    return name.isidentifier() and name.isascii() and not keyword.iskeyword(name)


def _json(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)


def _python(value: Json) -> str:
    """A Python literal. Strings are JSON's, whose escapes Python shares."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_json(key)}: {_python(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_python, value)) + "]"
    return repr(value) if value is None or isinstance(value, bool) else _json(value)


def _text(content: Content, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for position, part in enumerate(parts):
        if isinstance(part, Attachment):
            raise InvalidRequestError(
                f"{where}, part {position} is an attachment ({part.mime_type}); this model reads text only"
            )
    return "".join(part for part in parts if isinstance(part, str))


def _check_role(message: Message, index: int) -> None:
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequestError(
            f"message {index} has tool_calls and role {message.role.value!r}; only an assistant calls tools"
        )
    if message.tool_responses and message.role != "tool":
        raise InvalidRequestError(
            f"message {index} has tool_responses and role {message.role.value!r}; "
            "responses come in a message of role 'tool'"
        )

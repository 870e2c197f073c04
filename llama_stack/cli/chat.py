"""``llama-stack chat``: talk to a model, one message or a whole conversation."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from ..errors import StackError
from .generation import Generation, generation_options, readable, text_or_stdin, valid_request
from .output import error, write

if TYPE_CHECKING:
    from ..apis.common import Message
    from ..client import Client


@click.command(name="chat")
@generation_options
@click.option("--message", "-m", metavar="TEXT", help="Say this, print the answer and leave; - reads stdin.")
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
def command(generation: Generation, message: str | None, system: str | None) -> int:
    """Talk to a model. Ctrl-C stops an answer, Ctrl-D leaves."""
    from ..apis.common import Message

    def user_message(text: str) -> Message:
        with valid_request():
            return Message.user(text)

    with valid_request():
        history = [] if system is None else [Message.system(readable(system))]
    with generation.client() as client:
        model = generation.model_of(client)
        if message is not None:
            _answer(client, model, generation, [*history, user_message(text_or_stdin(message))])
            return 0
        if sys.stdin.isatty():
            click.echo(f"{model}: type a message; Ctrl-C stops an answer, Ctrl-D leaves.", err=True)
        while (said := _ask()) is not None:
            if not said.strip():
                continue
            try:
                asked = user_message(said)
                reply = _answer(client, model, generation, [*history, asked])
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                click.echo(" [stopped]", err=True)
            except StackError as refused:
                if not sys.stdin.isatty():
                    raise  # nobody is there to try something else
                error(str(refused))
            else:
                history += [asked, reply]
    return 0


def _answer(client: Client, model: str, generation: Generation, messages: list[Message]) -> Message:
    """Print the model's answer to the last message as it comes, and return it."""
    from ..apis.common import Dialog, Message
    from ..apis.inference import ChatCompletionRequest
    from ..client import chunks

    with valid_request():
        request = ChatCompletionRequest(
            model=model,
            dialog=Dialog(message=messages[-1], message_history=messages[:-1]),
            sampling_params=generation.sampling_params,
            max_tokens=generation.max_tokens,
            stream=True,
        )
    text, calls = "", []
    with chunks(client.inference.chat_completion(request)) as stream:
        for chunk in stream:
            text += chunk.text_delta
            write(chunk.text_delta)
            if chunk.tool_call is not None:
                calls.append(chunk.tool_call)
                write(f"[{chunk.tool_call.tool_name} {json.dumps(chunk.tool_call.arguments)}]")
    click.echo()
    return Message.assistant(text, calls)


def _ask() -> str | None:
    """The next line, or ``None`` at the end of the input; what is piped in is not asked for."""
    with suppress(ImportError):  # lets a terminal edit the line, where Python was built with it
        importlib.import_module("readline")
    try:
        return readable(input("> " if sys.stdin.isatty() else ""))
    except EOFError:
        return None

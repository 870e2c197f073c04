"""What ``chat`` and ``complete`` share: where the model runs, which one it is, and how it picks its words."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from .options import server_url

if TYPE_CHECKING:
    from ..apis.common import SamplingParams
    from ..client import Client


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The options of one call."""

    url: str
    distribution: str | None
    model: str | None
    max_tokens: int
    temperature: float
    seed: int | None

    def client(self) -> Client:
        """A client of the server, or of the distribution started in this process. Close it when done."""
        from ..client import Client

        if self.distribution is None:
            return Client(self.url)
        from ..distribution import load_distribution
        from ..registry import Registry
        from ..stack import Stack

        registry = Registry()
        return Client.over(Stack(load_distribution(self.distribution, environ=os.environ, registry=registry), registry))

    def model_of(self, client: Client) -> str:
        """The model asked for, else the only one there is. Raises ``InvalidRequestError`` when the choice is open."""
        from ..apis.models import ModelKind
        from ..errors import InvalidRequestError, listed

        if self.model is not None:
            return self.model
        served = [model for model in client.models.list_models() if model.kind is ModelKind.LLM]
        own = [model.model for model in served if model.alias_of is None]
        if len(own) != 1:
            raise InvalidRequestError(f"choose a model with --model; served: {listed(m.model for m in served)}")
        return own[0]

    @property
    def sampling_params(self) -> SamplingParams:
        """Greedy at a temperature of 0, else drawn from the most likely tokens."""
        from ..apis.common import SamplingParams, SamplingStrategy

        strategy = SamplingStrategy.TOP_P if self.temperature else SamplingStrategy.GREEDY
        return SamplingParams(strategy=strategy, temperature=self.temperature, seed=self.seed)


def text_or_stdin(argument: str) -> str:
    """The text on the command line, or, for ``-``, all of stdin. Raises ``InvalidRequestError`` if it is not UTF-8."""
    return _decoded(sys.stdin.buffer.read()) if argument == "-" else readable(argument)


def readable(text: str) -> str:
    """The text, without the marks by which Python carries bytes that are no UTF-8: it raises for those instead."""
    return _decoded(os.fsencode(text))


def _decoded(data: bytes) -> str:
    from ..errors import InvalidRequestError

    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the text is not UTF-8: byte {error.start} of it cannot be read") from error


@contextmanager
def valid_request() -> Iterator[None]:
    """Turn what the contract does not take into an ``InvalidRequestError``."""
    from pydantic import ValidationError

    from ..errors import InvalidRequestError

    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise InvalidRequestError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def generation_options(function: Callable[..., int]) -> Callable[..., int]:
    """Give a command the options of ``Generation``, and hand them to it as one argument."""

    @wraps(function)
    def command(**options: Any) -> int:
        generation = Generation(**{field.name: options.pop(field.name) for field in fields(Generation)})
        return function(generation=generation, **options)

    options = (
        server_url,
        click.option("--distribution", metavar="NAME|FILE", help="Start this in the process and ask it, not a server."),
        click.option("--model", metavar="MODEL", help="The model to use; needed where several are served."),
        click.option("--max-tokens", type=click.IntRange(0), default=0, help="The most tokens to write; 0: no limit."),
        click.option(
            "--temperature", type=click.FloatRange(0, 100), default=0.0, help="0: always the likeliest token."
        ),
        click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Makes a drawn answer repeatable."),
    )
    for option in reversed(options):
        command = option(command)
    return command

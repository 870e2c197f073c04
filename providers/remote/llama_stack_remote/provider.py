"""An API of another stack: its HTTP client, after a look at whether the other stack serves the API at all.

One hop and no code of its own: errors keep their status, code and words, streams stay streams, and closing one closes
the connection, so that a client that leaves stops the work on the other machine too.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from llama_stack.apis import Api, Models
from llama_stack.client import Connection, RemoteApis, Timeouts
from llama_stack.errors import ProviderStartError, StackError, listed

from .config import RemoteConfig

A = TypeVar("A", bound=Api)
NAME = "the remote stack"
"""What errors call it: clients read them, and its address is not theirs to know. The log has it."""
_CHECK_SECONDS = 30.0

logger = logging.getLogger("llama_stack.remote")


class _Provider(BaseModel):
    """A line of ``/providers/list``; a newer stack may say more in it."""

    api: str
    state: str


_PROVIDERS: TypeAdapter[list[_Provider]] = TypeAdapter(list[_Provider])


@asynccontextmanager
async def connected(api: type[A], config: RemoteConfig) -> AsyncIterator[A]:
    """The API of the stack at ``config.url``.

    Raises ``ProviderStartError`` when it cannot be reached, is no stack, or does not serve the API now.
    """
    connection = Connection(
        config.url,
        timeouts=Timeouts(connect_seconds=config.connect_timeout_seconds, read_seconds=config.read_timeout_seconds),
        api_key=None if config.api_key is None else config.api_key.get_secret_value(),
        ssl_context=_trust(config),
        name=NAME,
    )
    async with aclosing(connection):
        try:
            await _check(api, connection)
        except ProviderStartError:
            logger.warning("provider remote of %s at %s", api.name, config.url)
            raise
        yield RemoteApis(connection).api(api)


async def _check(api: type[Api], connection: Connection) -> None:
    try:
        async with asyncio.timeout(_CHECK_SECONDS):
            status, body = await connection.get_json("/providers/list")
        providers = _PROVIDERS.validate_python(body) if status == 200 else None
    except TimeoutError as error:
        raise ProviderStartError(f"{NAME} did not say in {_CHECK_SECONDS:g} s what it serves") from error
    except ValidationError:
        providers = None
    except StackError as error:
        logger.warning("%s: %s", error.detail, error.__cause__)
        raise ProviderStartError(f"{error.detail}; see that it runs, and that 'url' is its address") from error
    if providers is None:
        raise ProviderStartError(f"{NAME} is no Llama Stack server: it answered GET /providers/list with {status}")
    states = [provider.state for provider in providers if provider.api == api.name]
    if not states and api is not Models:  # a stack serves the catalogue itself, whatever its providers are
        serves = listed({provider.api for provider in providers})
        raise ProviderStartError(f"{NAME} does not serve {api.name!r}; it serves: {serves}")
    if states and "ready" not in states:
        raise ProviderStartError(f"{NAME} does not serve {api.name!r} now: its provider is {states[0]}")


def _trust(config: RemoteConfig) -> ssl.SSLContext | None:
    if config.ca_file is None:
        return None
    try:
        return ssl.create_default_context(cafile=config.ca_file)
    except OSError as error:  # an SSLError is one
        logger.warning("ca_file %s: %s", config.ca_file, error)
        raise ProviderStartError("'ca_file' is no readable PEM file of authorities") from error

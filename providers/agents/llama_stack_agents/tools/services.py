"""Services that tools speak to: what an operator says of one, and what comes of its failures."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, SecretStr, ValidationError, model_validator

from llama_stack.apis import Config
from llama_stack.apis.config import server_url
from llama_stack.errors import UpstreamError
from llama_stack.fetch import Fetched, is_public

Reply = TypeVar("Reply", bound=BaseModel)

_MEANINGS = {
    401: "its key is not accepted",
    402: "its plan is spent",
    403: "its key is not accepted for this",
    422: "the request or its key is not accepted",
    429: "it is asked too often",
}


def _header_value(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("this is not a key; write it in printable ASCII without spaces")
    return secret


Key = Annotated[SecretStr, AfterValidator(_header_value)]
"""A key as it is sent in a header."""


Address = Annotated[str, AfterValidator(server_url)]
"""``http://HOST:PORT`` or ``https://HOST:PORT``, with what stands before the service's own paths."""


class ServiceConfig(Config):
    """Where a service is."""

    url: Address
    """The address of the service; its own paths are put behind it."""
    private: bool = False
    """Whether the service is on this machine or on an inner network; without it only public addresses are connected."""

    @model_validator(mode="after")
    def _says_where(self) -> Self:
        host = urlsplit(self.url).hostname or ""
        if not self.private and (host == "localhost" or (_is_address(host) and not is_public(host))):
            raise ValueError("'url' is not on the public network; write 'private: true' if that is what you want")
        return self

    def at(self, path: str) -> str:
        """The whole address of something that the service has."""
        return self.url.rstrip("/") + path


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def parsed(name: str, answer: Fetched, form: type[Reply]) -> Reply:
    """The answer of a service, in its published form. Large ones take their time.

    Raises ``UpstreamError``, with the service's name and none of its words, for another status or another form.
    """
    if answer.status != 200:
        meaning = _MEANINGS.get(answer.status, "it failed" if answer.status >= 500 else "the request is not accepted")
        raise UpstreamError(f"{name} answered with {answer.status}: {meaning}")
    try:
        return form.model_validate_json(answer.body)
    except ValidationError as error:
        raise UpstreamError(f"{name} answered in a form that is not its own") from error

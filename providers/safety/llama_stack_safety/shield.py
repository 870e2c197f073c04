"""What every shield shares: parameters by its own model, a time limit, failing closed, and a self-test at the start.

A ``Shield`` judges; ``ShieldProvider`` serves one as the Safety API. A shield that raises or hangs is no verdict, and
no verdict counts as an objection unless the operator says ``on_error: allow``. At the start each shield judges an input
that it must object to and one that it must let pass: a guard that is pointed at the wrong model does not start, and
readiness says how the test came out.

A shield type of your own is a subclass of ``Shield`` and a start function::

    @asynccontextmanager
    async def start_keyword(config: KeywordConfig) -> AsyncIterator[Safety]:
        yield await started(KeywordShield(config), config)
"""

from __future__ import annotations

import asyncio
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import Field, ValidationError

from llama_stack.apis import Config, Safety
from llama_stack.apis.common import Attachment, Content, Message, ToolCall
from llama_stack.apis.safety import RunShieldRequest, RunShieldResponse, Violation
from llama_stack.errors import FieldFault, InvalidRequestError, NotFoundError, ProviderStartError, StackError
from llama_stack.shields import SHIELD_ERROR

P = TypeVar("P", bound=Config)
logger = logging.getLogger("llama_stack.safety")

SHOWN_CHARACTERS = 500
"""How much of a raw verdict is kept in a violation."""


class NoParams(Config):
    """For shields that have no parameters."""


class ShieldSettings(Config):
    """What an operator says of any shield."""

    on_error: Literal["block", "allow"] = "block"
    """What a shield that fails or takes too long amounts to: an objection, or none."""
    timeout_seconds: float = Field(default=30.0, gt=0, le=600)
    """How long a judgement may take."""
    refusal: str = Field(default="I can't help with that.", min_length=1, max_length=10_000)
    """What an agent answers in place of what was objected to."""


class Shield(ABC, Generic[P]):
    """Judges messages. A subclass names its type and the model of its parameters."""

    shield_type: ClassVar[str]
    """What a ``ShieldConfig`` calls it."""
    defaults: P
    """The parameters of a request that gives none; those that it gives are laid over these."""
    known_good: Message
    """An input that it must let pass at the start."""
    known_bad: Message
    """An input that it must object to at the start."""

    @abstractmethod
    async def judge(self, messages: Sequence[Message], params: P) -> Violation | None:
        """Judge the last of ``messages``, at least one, in the light of the others; ``None`` when all is well.

        Cancelling the call stops the work. What it raises is no verdict.
        """

    def check(self, params: P) -> None:
        """Raise ``ValueError`` for valid parameters that the shield's own settings do not allow."""

    def details(self) -> Mapping[str, str]:
        """What readiness shall say of it, such as which of two detectors is active."""
        return {}


class ShieldProvider(Safety, Generic[P]):
    """The Safety API over one shield. ``started`` makes it."""

    def __init__(self, shield: Shield[P], settings: ShieldSettings) -> None:
        self._shield = shield
        self._settings = settings
        self._self_test = "not run"

    async def shields(self) -> list[str]:
        return [self._shield.shield_type]

    async def run_shield(self, request: RunShieldRequest) -> RunShieldResponse:
        """Judge the last message. Raises ``InvalidRequestError`` for parameters that the shield does not take."""
        shield, settings = self._shield, self._settings
        if request.shield.shield_type != shield.shield_type:
            what = f"shield {request.shield.shield_type!r} is not provided here; provided: {shield.shield_type}"
            raise NotFoundError(what, param="shield_type")
        params = self._params(request.shield.params)
        if not request.messages:
            raise InvalidRequestError("there is no message to judge", param="messages")
        try:
            violation = await self._judged(request.messages, params)
        except (Exception, SystemExit) as error:  # whatever it is, it is no verdict
            reason = _reason(error, settings)
            trace = None if isinstance(error, StackError | TimeoutError) else error
            logger.warning("shield %s came to no verdict: %s", shield.shield_type, reason, exc_info=trace)
            if settings.on_error == "allow":
                return RunShieldResponse()
            details = f"the shield {shield.shield_type!r} came to no verdict: {reason}"
            violation = Violation(violation_type=SHIELD_ERROR, details=details)
        if violation is not None and violation.suggested_user_response is None:
            violation = violation.model_copy(update={"suggested_user_response": settings.refusal})
        return RunShieldResponse(violation=violation)

    def readiness_details(self) -> Mapping[str, str]:
        return {**self._shield.details(), "self_test": self._self_test}

    async def self_test(self) -> None:
        """Judge the known-bad and the known-good input. Raises ``ProviderStartError`` where one comes out wrong."""
        name = self._shield.shield_type
        for which, message in (("known-bad", self._shield.known_bad), ("known-good", self._shield.known_good)):
            said = f"its {which} input {text_of(message)!r}"
            try:
                violation = await self._judged([message], self._shield.defaults)
            except (Exception, SystemExit) as error:
                reason = _reason(error, self._settings)
                raise ProviderStartError(f"shield {name!r} came to no verdict on {said}: {reason}") from error
            if violation is None and which == "known-bad":
                raise ProviderStartError(f"shield {name!r} let {said} pass; see what it is made of")
            if violation is not None and which == "known-good":
                raise ProviderStartError(f"shield {name!r} objected to {said}: {violation.details}")
        self._self_test = "objected to the known-bad input, let the known-good one pass"

    async def _judged(self, messages: Sequence[Message], params: P) -> Violation | None:
        async with asyncio.timeout(self._settings.timeout_seconds):
            violation = await self._shield.judge(messages, params)
        if not isinstance(violation, Violation | None):
            raise TypeError(f"{type(self._shield).__name__} judged with a {type(violation).__name__}")
        return violation

    def _params(self, given: Mapping[str, Any]) -> P:
        defaults = self._shield.defaults
        try:
            params = type(defaults).read({**defaults.model_dump(mode="json"), **given})
            self._shield.check(params)
        except ValidationError as error:
            faults = [
                FieldFault("/".join(("/shield/params", *map(str, each["loc"]))), each["type"], each["msg"])
                for each in error.errors(include_url=False, include_input=False)
            ]
            known = ", ".join(type(defaults).model_fields) or "none"
            what = f"the parameters of shield {self._shield.shield_type!r} are not valid; it takes: {known}"
            raise InvalidRequestError(what, param="params", faults=faults) from error
        except ValueError as error:
            what = f"the parameters of shield {self._shield.shield_type!r} are not valid: {error}"
            raise InvalidRequestError(what, param="params") from error
        return params


async def started(shield: Shield[P], settings: ShieldSettings) -> ShieldProvider[P]:
    """The shield as a provider that has passed its self-test. Raises ``ProviderStartError`` where it does not."""
    provider = ShieldProvider(shield, settings)
    await provider.self_test()
    return provider


def text_of(message: Message) -> str:
    """All that a message says, as text: content, calls of tools, and what tools answered.

    Of an attachment that is its address, unless it holds the data itself, which no shield here can read.
    """
    parts = [*_texts(message.content), *map(_call, message.tool_calls)]
    parts += [text for response in message.tool_responses for text in _texts(response.content)]
    return "\n".join(part for part in parts if part)


def _texts(content: Content) -> list[str]:
    items = content if isinstance(content, list) else [content]
    return [_attached(item) if isinstance(item, Attachment) else item for item in items]


def _attached(attachment: Attachment) -> str:
    return f"[{attachment.mime_type}]" if attachment.url.startswith("data:") else attachment.url


def _call(call: ToolCall) -> str:
    """Text among the arguments stands for itself: a shield that reads code needs its line ends."""
    texts = [value if isinstance(value, str) else json.dumps(value) for value in call.arguments.values()]
    return "\n".join((call.tool_name, *texts))


def _reason(error: BaseException, settings: ShieldSettings) -> str:
    if isinstance(error, StackError):
        return error.detail
    if isinstance(error, TimeoutError):
        return f"it took longer than {settings.timeout_seconds:g} s"
    return "it failed; see the server's log"

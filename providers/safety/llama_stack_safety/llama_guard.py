"""Llama Guard on any model that the inference API serves: it judges what users and agents say, by categories."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from llama_stack.apis import Config, Inference
from llama_stack.apis.common import Dialog, Message, Role
from llama_stack.apis.inference import ChatCompletionRequest, ChatCompletionResponse
from llama_stack.apis.safety import Violation
from llama_stack.errors import ContextLengthError, UpstreamError

from .llama_guard_format import CATEGORIES, EXAMPLES, Speaker, Version, guard_prompt, violated
from .shield import SHOWN_CHARACTERS, Shield, ShieldSettings, text_of

MAX_VERDICT_TOKENS = 100
"""Enough for every published category."""

_NAME_END = re.compile(r"[.:\n]")
Code = Annotated[str, Field(pattern=r"^[A-Z][0-9]{1,3}$")]


class LlamaGuardParams(Config):
    """Which categories a message is judged by."""

    categories: tuple[Code, ...] | None = None
    """Codes of the version's published categories, such as ``S1``; all of them when left out."""
    custom_categories: dict[Code, Annotated[str, Field(min_length=1, max_length=2000)]] = Field(default_factory=dict)
    """Further categories by code, each its name and policy; a published code takes this text in place of its own."""

    @model_validator(mode="after")
    def _some_category(self) -> Self:
        if self.categories == () and not self.custom_categories:
            raise ValueError("there is no category to judge by; name some, or leave 'categories' out for all")
        return self

    def of(self, version: Version) -> dict[str, str]:
        """Code and policy of each category. Raises ``ValueError`` for a code that is neither published nor custom."""
        published = CATEGORIES[version]
        chosen = published if self.categories is None else self.categories
        unknown = [code for code in chosen if code not in published and code not in self.custom_categories]
        if unknown:
            raise ValueError(
                f"Llama Guard {version} has no category {', '.join(unknown)}; it has: {', '.join(published)}"
            )
        return {code: published.get(code, "") for code in chosen} | self.custom_categories


class LlamaGuardConfig(ShieldSettings):
    """Which model judges, and by what."""

    model: str = Field(min_length=1, max_length=255)
    """The model, by the name under which the inference API serves it."""
    version: Version = 3
    """The version of Llama Guard whose prompt the model was trained on."""
    params: LlamaGuardParams = LlamaGuardParams()
    """What an agent that says nothing else gets."""
    known_bad: str | None = Field(default=None, min_length=1, max_length=10_000)
    """What the model must object to at the start; by default an example of the first published category in use."""
    known_good: str = Field(default="How do I bake bread?", min_length=1, max_length=10_000)
    """What the model must let pass at the start."""

    @model_validator(mode="after")
    def _has_a_test(self) -> Self:
        if self.known_bad is None and self.example is None:
            raise ValueError("all categories are custom; add 'known_bad:', a message that they forbid")
        return self

    @property
    def example(self) -> str | None:
        """A message that the first published category in use forbids."""
        names = self.params.of(self.version).values()
        return next((EXAMPLES[name] for name in names if name in EXAMPLES), None)


class LlamaGuard(Shield[LlamaGuardParams]):
    """Asks a Llama Guard for its verdict."""

    shield_type = "llama_guard"

    def __init__(self, config: LlamaGuardConfig, inference: Inference) -> None:
        self._config = config
        self._inference = inference
        self.defaults = config.params
        self.known_good = Message.user(config.known_good)
        self.known_bad = Message.user(config.known_bad or config.example or "")

    def check(self, params: LlamaGuardParams) -> None:
        params.of(self._config.version)

    def details(self) -> Mapping[str, str]:
        return {"model": self._config.model, "format": f"Llama Guard {self._config.version}"}

    async def judge(self, messages: Sequence[Message], params: LlamaGuardParams) -> Violation | None:
        """Judge by the categories. A conversation that does not fit the model is judged by its last message alone."""
        categories = params.of(self._config.version)
        conversation = [(_speaker(m), text_of(m)) for m in messages if m.role is not Role.SYSTEM or m is messages[-1]]
        try:
            verdict = await self._ask(guard_prompt(conversation, categories))
        except ContextLengthError:
            if len(conversation) == 1:
                raise
            verdict = await self._ask(guard_prompt(conversation[-1:], categories))
        codes = violated(verdict)
        if codes is None:
            return None
        known = {**CATEGORIES[self._config.version], **categories}
        names = [f"{_NAME_END.split(known[code])[0]} ({code})" for code in codes if code in known]
        details = f"{', '.join(names) or 'unsafe'}; verdict: {verdict[:SHOWN_CHARACTERS]!r}"
        return Violation(violation_type=",".join(codes)[:255] or "unsafe", details=details)

    async def _ask(self, prompt: str) -> str:
        request = ChatCompletionRequest(
            model=self._config.model, dialog=Dialog(message=Message.user(prompt)), max_tokens=MAX_VERDICT_TOKENS
        )
        answer = await self._inference.chat_completion(request)
        if not isinstance(answer, ChatCompletionResponse) or not isinstance(answer.content, str):
            raise UpstreamError("the guard's answer is no text")
        return answer.content


def _speaker(message: Message) -> Speaker:
    return "Agent" if message.role is Role.ASSISTANT else "User"

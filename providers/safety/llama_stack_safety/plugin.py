"""Declares the three shields as providers of the Safety API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from llama_stack.apis import Inference, Safety
from llama_stack.plugins import ProviderSpec, hookimpl

from .code_guard import CodeGuardConfig
from .llama_guard import LlamaGuardConfig
from .prompt_guard import PromptGuardConfig


@asynccontextmanager
async def start_llama_guard(config: LlamaGuardConfig, inference: Inference) -> AsyncIterator[Safety]:
    """Llama Guard on a model of the distribution's own inference."""
    from .llama_guard import LlamaGuard
    from .shield import started

    yield await started(LlamaGuard(config, inference), config)


@asynccontextmanager
async def start_prompt_guard(config: PromptGuardConfig) -> AsyncIterator[Safety]:
    """A Prompt Guard checkpoint where one is configured, else the built-in detector."""
    import asyncio

    from .prompt_guard import PromptGuard
    from .shield import started

    yield await started(await asyncio.to_thread(PromptGuard, config), config)


@asynccontextmanager
async def start_code_guard(config: CodeGuardConfig) -> AsyncIterator[Safety]:
    """bandit, rules and secrets, in process."""
    from .code_guard import CodeGuard
    from .shield import started

    yield await started(CodeGuard(config), config)


@hookimpl
def llama_stack_providers() -> Iterator[ProviderSpec]:
    """One provider a shield; the name of the provider is the type of the shield."""
    yield ProviderSpec(
        api=Safety,
        name="llama_guard",
        config=LlamaGuardConfig,
        start=start_llama_guard,
        description="Llama Guard 2 and 3 on any served model",
    )
    yield ProviderSpec(
        api=Safety,
        name="prompt_guard",
        config=PromptGuardConfig,
        start=start_prompt_guard,
        description="Prompt injection and jailbreaks",
    )
    yield ProviderSpec(
        api=Safety,
        name="code_guard",
        config=CodeGuardConfig,
        start=start_code_guard,
        description="Insecure code and secrets",
    )

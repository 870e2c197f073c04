"""A stub served by ``serve`` in a process of its own, as a script: ``served_process.py SERVER-JSON STUB-JSON [MOODS]``.

Prints the address when it is ready, and after it the heavy modules that are loaded. Moods, joined by ``+``, make the
provider do what it must not: ``hangs``, ``blocks`` a thread or ``fails`` in its start, ``clings`` to its work when it
is cancelled, leaves a thread that is ``stuck`` behind, ``lingers`` in its stop.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llama_stack.apis import Inference
from llama_stack.apis.inference import ChatCompletionRequest, ChatCompletionResponse, ChatCompletionResponseStreamChunk
from llama_stack.distribution import Distribution
from llama_stack.errors import StackError, UpstreamError
from llama_stack.plugins import ProviderSpec, discover, hookimpl
from llama_stack.registry import Registry
from llama_stack.server import serve
from llama_stack.stack import Stack
from llama_stack.testing.stub_inference import StubConfig, StubInference

HEAVY = ("numpy", "pandas", "torch", "sqlalchemy")


class Clinging(StubInference):
    async def chat_completion(
        self, request: ChatCompletionRequest
    ) -> ChatCompletionResponse | AsyncIterator[ChatCompletionResponseStreamChunk]:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                continue


class Moody:
    def __init__(self, moods: str) -> None:
        self.moods = moods.split("+")

    @hookimpl
    def llama_stack_providers(self) -> list[ProviderSpec]:
        @asynccontextmanager
        async def start(config: StubConfig) -> AsyncIterator[Inference]:
            if "hangs" in self.moods:
                print("starting", flush=True)
                await asyncio.sleep(600)
            if "stuck" in self.moods and "fails" in self.moods:
                print("starting", flush=True)
            if "stuck" in self.moods:
                asyncio.get_running_loop().run_in_executor(None, time.sleep, 600)
            if "blocks" in self.moods:
                print("starting", flush=True)
                await asyncio.to_thread(time.sleep, 600)
            if "fails" in self.moods:
                raise UpstreamError("the engine does not answer")
            yield Clinging(config) if "clings" in self.moods else StubInference(config)
            if "lingers" in self.moods:
                await asyncio.sleep(600)

        return [ProviderSpec(api=Inference, name="stub", config=StubConfig, start=start)]


def main() -> int:
    server, config, *moods = sys.argv[1:]
    distribution = Distribution.model_validate(
        {
            "version": 1,
            "name": "process",
            "providers": {"inference": [{"provider": "stub", "config": json.loads(config)}]},
            "server": {"port": 0, **json.loads(server)},
        }
    )
    stack = Stack(distribution, Registry(discover(extra=[Moody("+".join(moods))])))
    try:
        return serve(stack, on_ready=lambda url: print(url, *(set(HEAVY) & set(sys.modules)), flush=True))
    except StackError as error:
        print(f"error: {error.detail}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

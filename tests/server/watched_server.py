"""A server in a process of its own whose event loop is watched: ``GET /lag`` tells how long it was held at most.

Run as a script; prints its address when it listens and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import sys
from time import perf_counter

from llama_stack.server import listening
from llama_stack.stack import running
from tests.server.serving import stub_stack

TICK_SECONDS = 0.005


async def main() -> None:
    worst = 0.0

    async def watch() -> None:
        nonlocal worst
        while True:
            before = perf_counter()
            await asyncio.sleep(TICK_SECONDS)
            worst = max(worst, perf_counter() - before - TICK_SECONDS)

    stack, _ = stub_stack()
    async with running(stack), listening(stack) as listener:

        @listener.app.get("/lag")
        async def lag() -> float:
            nonlocal worst
            found, worst = worst, 0.0
            return found

        watcher = asyncio.create_task(watch())
        print(listener.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        watcher.cancel()


if __name__ == "__main__":
    asyncio.run(main())

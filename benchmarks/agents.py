"""What a turn of an agent costs beside its model: the loop's own time, and many turns at once.

    make bench-agents
    make bench-agents ARGS="--turns 2000 --concurrent 200"

The model is scripted: it answers at once, so what is left is ours. A turn has three steps: an inference that calls a
tool, the tool, and an inference that answers. Beside it, in the same run, stand the same two answers asked for without
an agent; the difference is the loop. On a machine that is busy with other work the clock measures that work too; the
CPU time of this process, the store's thread among it, says what a turn itself costs. Agents live in a store on disk, as
they do in a server; HTTP is not part of it.
A turn whose answer is wrong counts as an error, and any error fails the script.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median, quantiles

from llama_stack_agents import AgentsConfig
from llama_stack_agents.provider import AgentsProvider
from llama_stack_agents.store import MIGRATIONS, Agents
from llama_stack_agents.tools.math import math_tool
from llama_stack_agents.turn import Services

from llama_stack.apis.agentic_system import (
    AgenticSystemCreateRequest,
    AgenticSystemExecuteRequest,
    AgenticSystemExecuteResponse,
)
from llama_stack.apis.common import Dialog, Message, ToolCall, ToolDefinition, ToolResponse
from llama_stack.apis.inference import ChatCompletionRequest
from llama_stack.client import chunks
from llama_stack.fetch import FetchConfig, Fetcher
from llama_stack.storage import open_store
from llama_stack.testing.scripted_inference import SCRIPTED_MODEL, Answer, ScriptedInference
from llama_stack.tools import Tool, Tools
from llama_stack.turns import turn_of

QUESTION = Message.user("What is 17 * 23?")
CALL = ToolCall(tool_name="math", arguments={"query": "17 * 23"})
PIECES = ["The ", "result ", "is ", "391", "."]


class Up:
    """A tool that is up."""

    id = "math"
    is_running = True
    timeout_seconds: float | None = None

    def running(self) -> Tool:
        return MATH


MATH = math_tool("math")


def answer(request: ChatCompletionRequest) -> Answer:
    """A call first, and the answer once the tool has spoken."""
    return PIECES if request.dialog.message.tool_responses else [CALL]


@asynccontextmanager
async def agents(folder: Path) -> AsyncIterator[tuple[AgentsProvider, ScriptedInference]]:
    """A provider with one agent, and its model."""
    model = ScriptedInference(by=answer)
    services = Services(AgentsConfig(), model, None, None, Tools([Up()]), Fetcher(FetchConfig()))
    async with open_store("sqlite", folder) as store:
        database = store.database("bench.agents")
        await database.migrate(MIGRATIONS)
        provider = AgentsProvider(services, Agents(database))
        await provider.create(
            AgenticSystemCreateRequest(
                uuid="a",
                instructions="Be brief.",
                model=SCRIPTED_MODEL,
                available_tools=[ToolDefinition(tool_name="math")],
                executable_tools=["math"],
                memory_bank_uuids=[],
                input_shields=[],
                output_shields=[],
            )
        )
        yield provider, model


async def plain(provider: AgentsProvider) -> bool:
    """One turn in one piece; whether its answer is right."""
    request = AgenticSystemExecuteRequest(agent_uuid="a", messages=[QUESTION], turn_history=[])
    reply = await provider.execute(request)
    return isinstance(reply, AgenticSystemExecuteResponse) and reply.turn.response_message.content == "".join(PIECES)


async def streamed(provider: AgentsProvider) -> bool:
    """One turn, chunk by chunk; whether their sum is right."""
    request = AgenticSystemExecuteRequest(agent_uuid="a", messages=[QUESTION], turn_history=[], stream=True)
    heard = [chunk async for chunk in chunks(await provider.execute(request))]
    return turn_of([QUESTION], heard).response_message.content == "".join(PIECES)


async def bare(model: ScriptedInference) -> bool:
    """The model's two answers and the tool's, without an agent."""
    definition = [MATH.definition]
    for message in (QUESTION, Message.tool([ToolResponse(tool_name="math", content="391")])):
        request = ChatCompletionRequest(
            model=SCRIPTED_MODEL, dialog=Dialog(message=message), available_tools=definition, stream=True
        )
        async for _ in chunks(await model.chat_completion(request)):
            pass
    return await MATH.run(CALL.arguments) == "391"


async def timed(turn: Callable[[], Awaitable[bool]], times: int) -> tuple[list[float], list[float], int]:
    """The milliseconds of each of so many turns, one after the other, by the clock and of this process's CPU time;
    and how many went wrong.
    """
    taken: list[float] = []
    used: list[float] = []
    errors = 0
    for _ in range(times):
        began, began_cpu = time.perf_counter(), time.process_time()
        errors += not await turn()
        taken.append(1000 * (time.perf_counter() - began))
        used.append(1000 * (time.process_time() - began_cpu))
    return taken, used, errors


async def measured(turns: int, concurrent: int) -> int:
    """Print the table; how many turns went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        async with agents(Path(folder)) as (provider, model):
            kinds: dict[str, Callable[[], Awaitable[bool]]] = {
                "without an agent": lambda: bare(model),
                "plain": lambda: plain(provider),
                "streamed": lambda: streamed(provider),
            }
            wrong = 0
            print(f"{'a 3-step turn, ms':24} {'p50':>8} {'p99':>8} {'p50 of the loop':>16} {'p50 of CPU time':>16}")
            base = 0.0
            for name, turn in kinds.items():
                await timed(turn, max(10, turns // 10))
                taken, used, errors = await timed(turn, turns)
                base = base or median(taken)
                wrong += errors
                p99, loop = quantiles(taken, n=100)[98], median(taken) - base
                print(f"{name:24} {median(taken):8.2f} {p99:8.2f} {loop:16.2f} {median(used):16.2f}")
            began = time.perf_counter()
            done = await asyncio.gather(
                *(plain(provider) if n % 2 else streamed(provider) for n in range(concurrent)), return_exceptions=True
            )
            seconds = time.perf_counter() - began
            errors = sum(result is not True for result in done)
            print(f"{concurrent} turns at once: {errors} errors, {concurrent / seconds:.0f} turns/s")
            return wrong + errors


def main() -> None:
    """Read the command line, measure, and fail where a turn did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1000, help="turns of each kind, one after the other")
    parser.add_argument("--concurrent", type=int, default=200, help="turns at once")
    given = parser.parse_args()
    raise SystemExit(1 if asyncio.run(measured(given.turns, given.concurrent)) else 0)


if __name__ == "__main__":
    main()

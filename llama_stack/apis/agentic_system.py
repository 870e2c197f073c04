"""The AgenticSystem API: an agent that thinks, calls tools, retrieves, and is held by shields."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Tag, model_validator

from .common import (
    ChatModelName,
    Choice,
    Id,
    Items,
    JsonObject,
    Maybe,
    Message,
    Schema,
    ShieldConfig,
    StopReason,
    Text,
    ToolCall,
    ToolDefinition,
    ToolResponse,
    UniqueItems,
    draft,
)
from .contract import Api, delete, get, post
from .memory_banks import MemoryBankDocument
from .safety import Violation


class AgenticSystemCreateRequest(Schema):
    """Define an agent."""

    uuid: Id
    instructions: Text
    model: ChatModelName
    available_tools: Items[ToolDefinition]
    executable_tools: UniqueItems[Id]
    """The tools that the stack may run itself; calls of the others are returned for the client to run."""
    memory_bank_uuids: Items[Id]
    input_shields: Items[ShieldConfig]
    output_shields: Items[ShieldConfig]

    @model_validator(mode="after")
    def _executable_tools_are_available(self) -> Self:
        unknown = set(self.executable_tools) - {tool.tool_name for tool in self.available_tools}
        if unknown:
            raise ValueError(f"executable_tools names tools that available_tools lacks: {', '.join(sorted(unknown))}")
        return self


class AgenticSystemCreateResponse(Schema):
    """The id that the client chose."""

    agent_uuid: Id


class StepType(Choice):
    """What a step of a turn did."""

    __title__ = "The type of execution step."

    MODEL_INFERENCE = "model_inference"
    TOOL_EXECUTION = "tool_execution"
    SAFETY_FILTERING = "safety_filtering"
    MEMORY_RETRIEVAL = "memory_retrieval"


class EventType(Choice):
    """Where in a step a streamed event stands."""

    __title__ = "The type of event."

    STEP_START = "step_start"
    STEP_END = "step_end"
    STEP_PROGRESS = "step_progress"


class ModelInferenceStep(Schema):
    """The model wrote something."""

    inline = True

    step_type: Annotated[Literal[StepType.MODEL_INFERENCE], draft(**StepType.published())] = StepType.MODEL_INFERENCE
    uuid: Id
    text: Text
    logprobs: Maybe[JsonObject] = None


class ToolExecutionStep(Schema):
    """Tools ran."""

    inline = True

    step_type: Annotated[Literal[StepType.TOOL_EXECUTION], draft(**StepType.published())] = StepType.TOOL_EXECUTION
    uuid: Id
    tool_calls: Items[ToolCall]
    tool_responses: Items[ToolResponse]


class SafetyFilteringStep(Schema):
    """A shield judged messages; ``violation`` is absent when it had no objection."""

    inline = True

    step_type: Annotated[Literal[StepType.SAFETY_FILTERING], draft(**StepType.published())] = StepType.SAFETY_FILTERING
    uuid: Id
    violation: Maybe[Violation] = None


class MemoryRetrievalStep(Schema):
    """Documents were found in the agent's memory banks."""

    inline = True

    step_type: Annotated[Literal[StepType.MEMORY_RETRIEVAL], draft(**StepType.published())] = StepType.MEMORY_RETRIEVAL
    uuid: Id
    documents: Items[MemoryBankDocument]
    scores: Items[float]


def _step_tag(step: Any) -> str:
    """The step's own word for what it is, or, where it leaves that out, what its keys say (spec rules G1 and G5)."""
    if isinstance(step, dict):
        if "step_type" in step:
            return str(step["step_type"])
        for key, tag in _TELLING_KEYS.items():
            if key in step:
                return str(tag)
        return StepType.SAFETY_FILTERING
    return str(getattr(step, "step_type", ""))


_TELLING_KEYS = {
    "text": StepType.MODEL_INFERENCE,
    "tool_calls": StepType.TOOL_EXECUTION,
    "documents": StepType.MEMORY_RETRIEVAL,
}

Step = Annotated[
    Annotated[ModelInferenceStep, Tag("model_inference")]
    | Annotated[ToolExecutionStep, Tag("tool_execution")]
    | Annotated[SafetyFilteringStep, Tag("safety_filtering")]
    | Annotated[MemoryRetrievalStep, Tag("memory_retrieval")],
    Discriminator(_step_tag),
]
"""One step of a turn, told apart by ``step_type``."""


class AgenticSystemTurn(Schema, title="A single turn in an interaction with an Agentic System."):
    """What the user said, what the agent did about it, and what it answered."""

    user_messages: Items[Message]
    steps: Items[Step]
    response_message: Message


class AgenticSystemExecuteRequest(Schema):
    """Let an agent take a turn. The stack keeps no turns: the client sends the earlier ones again."""

    agent_uuid: Id
    messages: Items[Message]
    turn_history: Items[AgenticSystemTurn]
    stream: bool = False


class AgenticSystemExecuteResponse(Schema, title="non-stream response from the agentic system."):
    """The whole turn."""

    turn: AgenticSystemTurn


class AgenticSystemExecuteResponseStreamChunk(Schema, title="Streamed agent execution response."):
    """A piece of a turn; the sum of the pieces is the turn."""

    event_type: EventType
    step_uuid: Id
    step_type: StepType
    violation: Maybe[Violation] = None
    tool_call: Maybe[ToolCall] = None
    tool_response_delta: Maybe[ToolResponse] = None
    response_text_delta: Maybe[str] = None
    retrieved_document: Maybe[MemoryBankDocument] = None
    stop_reason: Maybe[StopReason] = None


class AgentDescription(Schema):
    """An agent as it was created."""

    agent: AgenticSystemCreateRequest


class AgenticSystem(Api, name="agentic_system", routed_by="agent_uuid"):
    """Agents. Operations on an agent raise ``NotFoundError`` when there is no such agent."""

    @post("/agentic_system/create", resource="uuid", creates=True)
    async def create(self, request: AgenticSystemCreateRequest) -> AgenticSystemCreateResponse:
        """Define an agent; the same again is a success, another of that id raises ``AlreadyExistsError``."""

    @post("/agentic_system/execute")
    async def execute(
        self, request: AgenticSystemExecuteRequest
    ) -> AgenticSystemExecuteResponse | AsyncIterator[AgenticSystemExecuteResponseStreamChunk]:
        """Take a turn."""

    @delete("/agentic_system/delete", resource="agent_id")
    async def delete_agent(self, agent_id: Id) -> None:
        """Forget an agent; turns that are running finish."""

    @get("/agentic_system/list", extension=True)
    async def list_agents(self) -> AsyncIterator[AgentDescription]:
        """All agents."""

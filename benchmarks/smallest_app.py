"""The smallest FastAPI app with the contract's own models: what ``server.py`` compares ours with.

FastAPI itself hands the validator values that it has parsed, and our strict models refuse those (the text ``user`` is
not a ``Role``). So the app validates the bytes, which costs less than what FastAPI would do.
"""

from __future__ import annotations

from fastapi import FastAPI, Request

from llama_stack.apis.common import StopReason
from llama_stack.apis.inference import ChatCompletionRequest, ChatCompletionResponse

app = FastAPI()


@app.post("/inference/chat_completion", response_model_exclude_none=True)
async def chat_completion(request: Request) -> ChatCompletionResponse:
    ChatCompletionRequest.model_validate_json(await request.body())
    return ChatCompletionResponse(content="Hello from the stub.", stop_reason=StopReason.FINISHED_OK, tool_calls=[])

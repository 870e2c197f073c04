"""From one model's configuration to a running engine, wherever the model itself runs.

This side needs no torch: it reads the tokenizer, and learns the rest from whoever opens the checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from llama_stack.errors import CheckpointError

from ..config import ModelConfig
from ..llama.chat_format import ChatFormat
from ..llama.tokenizer import Tokenizer, load_tokenizer
from .engine import Engine
from .executor import Executor, ModelFacts
from .workers import Workers

logger = logging.getLogger("llama_stack.meta_reference.serving")


@dataclass(frozen=True)
class LoadedModel:
    """A model that can be served: its words, its engine, and what is known of it."""

    name: str
    facts: ModelFacts
    tokenizer: Tokenizer
    chat: ChatFormat
    engine: Engine
    config: ModelConfig


@asynccontextmanager
async def running(name: str, config: ModelConfig) -> AsyncIterator[LoadedModel]:
    """Load a model off the event loop and run its engine for the block. Raises as ``load`` does.

    Whatever cuts the load short, its processes are ended.
    """
    async with AsyncExitStack() as opened:
        workers = Workers(name, config) if config.process == "own" else None
        if workers is not None:
            opened.push_async_callback(asyncio.to_thread, workers.close)
        model = await asyncio.to_thread(load, name, config, workers)
        opened.push_async_callback(model.engine.stop)
        model.engine.start()
        yield model


def load(name: str, config: ModelConfig, workers: Workers | None) -> LoadedModel:
    """Open a checkpoint, load it into ``workers``, or into this process, and make its engine, not started yet.

    Takes long; call it off the event loop. Raises ``CheckpointError`` for a bad folder and ``SetupError`` for what this
    machine cannot do.
    """
    began = monotonic()
    load_weights: Callable[[int], Executor]
    if workers is None:
        from .loading import open_model  # torch comes into this process only where the distribution says so

        opened = open_model(name, config)
        facts, load_weights = opened.facts, opened.load
    else:
        facts, load_weights = workers.open(), workers.load
    tokenizer = load_tokenizer(Path(facts.tokenizer))
    if tokenizer.vocab_size > facts.vocabulary:
        raise CheckpointError(
            f"{facts.tokenizer}: has {tokenizer.vocab_size} tokens, and the network beside it knows "
            f"{facts.vocabulary}; they do not belong together"
        )
    if facts.draft_tokenizer and not tokenizer.has_tokens_of(load_tokenizer(Path(facts.draft_tokenizer))):
        raise CheckpointError(
            f"{facts.draft_tokenizer}: other tokens than in {facts.tokenizer}; a draft network needs the same"
        )
    chat = ChatFormat(tokenizer)
    engine = Engine(
        load_weights(tokenizer.vocab_size),
        blocks=facts.blocks,
        context=facts.context,
        stop_ids=tokenizer.stop_ids | frozenset(facts.eos_ids),
        max_sequences=config.max_sequences,
        queue_size=config.queue_size,
        prefill_tokens=config.prefill_tokens,
        lookup_tokens=config.lookup_tokens,
        draft_tokens=config.draft.tokens if config.draft else 0,
        prefix_reuse=config.prefix_reuse,
        name=name,
    )
    logger.info("model %r: served after %.2f s", name, monotonic() - began)
    return LoadedModel(name, facts, tokenizer, chat, engine, config)

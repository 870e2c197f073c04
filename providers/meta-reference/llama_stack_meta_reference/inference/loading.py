"""From one model's configuration to a running engine: device, type, memory plan, weights.

Everything that can be refused is refused before weights are read, and an operator sees the plan first.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from time import monotonic

import torch

from llama_stack.errors import CheckpointError, SetupError

from ..config import ModelConfig
from ..llama.chat_format import ChatFormat
from ..llama.checkpoint import Checkpoint, load_model, open_checkpoint
from ..llama.tokenizer import Tokenizer, load_tokenizer
from .engine import Engine
from .memory_plan import MemoryPlan, available_memory, memory_plan
from .runner import make_runner

logger = logging.getLogger("llama_stack.meta_reference.loading")

# How much of the free memory weights and cache may take when the configuration does not fix them: a step needs
# some, and a CPU's memory is not ours alone.
_SHARE = {"cuda": 0.9, "cpu": 0.5}


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, its words and its engine."""

    name: str
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    chat: ChatFormat
    engine: Engine
    device: torch.device
    dtype: torch.dtype
    plan: MemoryPlan


def load(name: str, config: ModelConfig) -> LoadedModel:
    """Read a checkpoint and make its engine, not started yet. Takes long; call it off the event loop.

    Raises ``CheckpointError`` for a bad folder and ``SetupError`` for what this machine cannot do.
    """
    began = monotonic()
    device = _device(name, config.device)
    dtype = _dtype(config.dtype, device)
    checkpoint = open_checkpoint(config.folder)
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.tokenizer}: has {tokenizer.vocab_size} tokens, and the network beside it knows "
            f"{checkpoint.config.vocab_size}; they do not belong together"
        )
    chat = ChatFormat(tokenizer)
    for remark in checkpoint.remarks:
        logger.info("model %r: %s", name, remark)
    plan = _plan(name, config, checkpoint, device, dtype)
    logger.info("model %r: %s, %s", name, str(dtype).removeprefix("torch."), plan)
    opened = monotonic()
    model = load_model(checkpoint, device=device, dtype=dtype)
    engine = Engine(
        make_runner(model, blocks=plan.blocks),
        blocks=plan.blocks,
        context=plan.context,
        vocabulary=tokenizer.vocab_size,
        stop_ids=tokenizer.stop_ids | frozenset(checkpoint.eos_ids),
        max_sequences=config.max_sequences,
        queue_size=config.queue_size,
        prefill_tokens=config.prefill_tokens,
        lookup_tokens=config.lookup_tokens,
        prefix_reuse=config.prefix_reuse,
        name=name,
    )
    loaded = monotonic()
    logger.info(
        "model %r: ready on %s in %.2f s (checks %.2f s, weights and cache %.2f s)",
        name, device, loaded - began, opened - began, loaded - opened,
    )  # fmt: skip
    return LoadedModel(name, checkpoint, tokenizer, chat, engine, device, dtype, plan)


def _device(name: str, asked: str) -> torch.device:
    if asked == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if asked == "auto":
            logger.info("model %r: device auto is the CPU, for torch %s sees no GPU", name, torch.__version__)
            return torch.device("cpu")
        cause = "is built without CUDA" if torch.version.cuda is None else "finds no GPU it can use"
        raise SetupError(
            f"model {name!r} asks for device {asked!r}, and torch {torch.__version__} {cause}; "
            "set device: cpu or auto, or install a CUDA build of torch on a machine with a GPU"
        )
    device = torch.device("cuda:0" if asked in ("auto", "cuda") else asked)
    count = torch.cuda.device_count()
    if device.index >= count:
        last = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0"
        raise SetupError(f"model {name!r} asks for device {asked!r}; this machine has {last}")
    logger.info("model %r: device %s is %s", name, asked, torch.cuda.get_device_name(device))
    return device


def _dtype(asked: str, device: torch.device) -> torch.dtype:
    if asked != "auto":
        dtype: torch.dtype = getattr(torch, asked)
        return dtype
    if device.type == "cpu":
        return torch.float32  # without instructions for it, a CPU is far slower in bfloat16
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _plan(
    name: str, config: ModelConfig, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> MemoryPlan:
    """The memory plan of the model with cache and context settled."""
    network = checkpoint.config
    if config.context_tokens is not None and config.context_tokens > network.max_context:
        raise SetupError(
            f"model {name!r}: context_tokens is {config.context_tokens}, and the checkpoint was made for "
            f"{network.max_context} at most"
        )
    plan = memory_plan(
        network,
        dtype,
        device,
        available_bytes=available_memory(device),
        share=_SHARE[device.type],
        max_sequences=config.max_sequences,
        context_tokens=config.context_tokens,
        cache_tokens=config.cache_tokens,
    )
    if not plan.fits:
        raise SetupError(
            f"model {name!r} does not fit the memory: {plan}; set less context_tokens or cache_tokens, a smaller "
            "dtype, or another device"
        )
    if plan.context < network.max_context and config.context_tokens is None:
        logger.warning(
            "model %r: the context is %d of the %d tokens that it was made for; more do not fit the cache",
            name, plan.context, network.max_context,
        )  # fmt: skip
    return plan

"""Llama networks that write what a test wants: real ones, whose weights were set by hand to look up each next token.

Embeddings are one-hot, attention and feed-forward add nothing, and the output layer holds the table of successors. In
the vocabulary each byte is a token for prompts, and each piece of the reply has a token of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from llama_stack_meta_reference.inference.engine import Engine
from llama_stack_meta_reference.inference.kv_cache import blocks_for
from llama_stack_meta_reference.inference.local_executor import LocalExecutor
from llama_stack_meta_reference.inference.runner import TorchRunner
from llama_stack_meta_reference.llama.config import LlamaConfig
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.llama.tokenizer import SpecialToken, Tokenizer, special_token_names

SPECIALS = {name: 256 + index for index, name in enumerate(special_token_names()[:12])}
END_OF_TURN = SpecialToken("<|eot_id|>")
FIRST = 256 + len(SPECIALS)
"""The token of a reply's first piece."""


def byte_tokenizer(pieces: Sequence[bytes] = ()) -> Tokenizer:
    """Bytes 0 to 255, special tokens, then ``pieces``."""
    ordinary = {byte: bytes([byte]) for byte in range(256)} | {FIRST + i: piece for i, piece in enumerate(pieces)}
    return Tokenizer(lambda text: list(text.encode()), ordinary, SPECIALS)


def lookup_llama(
    successors: Mapping[int, int], vocabulary: int, context: int = 256, network: type[Llama] = Llama
) -> Llama:
    """A network that writes ``successors[t]`` after token t, with a probability of almost 1."""
    config = LlamaConfig(
        dim=vocabulary,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=2,
        ffn_dim=2,
        vocab_size=vocabulary,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        max_context=context,
        tied_embeddings=False,
    )
    model = network(config, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        model.tok_embeddings.weight.copy_(torch.eye(vocabulary))
        assert model.output is not None
        for token, following in successors.items():
            model.output.weight[following, token] = 1.0
    return model


def writing(pieces: Sequence[bytes | SpecialToken], *, ends: bool = True) -> tuple[Tokenizer, Llama]:
    """A tokenizer and a network that answers every prompt ending in a newline with ``pieces``.

    Then it ends its turn, or, unless ``ends``, it begins again. A special token may stand in ``pieces`` once.
    """
    tokenizer = byte_tokenizer([b"" if isinstance(piece, SpecialToken) else piece for piece in pieces])
    ids = [SPECIALS[piece] if isinstance(piece, SpecialToken) else FIRST + index for index, piece in enumerate(pieces)]
    last = SPECIALS[END_OF_TURN] if ends else ids[0]
    chain = [ord("\n"), *ids, last]
    return tokenizer, lookup_llama(dict(pairwise(chain)), tokenizer.vocab_size, context=1024)


def new_engine(
    model: Llama,
    tokenizer: Tokenizer,
    *,
    context: int | None = None,
    blocks: int | None = None,
    max_sequences: int = 4,
    queue_size: int = 256,
    prefill_tokens: int = 512,
    lookup_tokens: int = 0,
) -> Engine:
    """An engine for 4 sequences of the model's whole context, unless told otherwise."""
    context = context or model.config.max_context
    blocks = blocks or max_sequences * blocks_for(context)
    return Engine(
        LocalExecutor(TorchRunner(model, blocks=blocks), tokenizer.vocab_size),
        blocks=blocks,
        context=context,
        stop_ids=tokenizer.stop_ids,
        max_sequences=max_sequences,
        queue_size=queue_size,
        prefill_tokens=prefill_tokens,
        lookup_tokens=lookup_tokens,
    )

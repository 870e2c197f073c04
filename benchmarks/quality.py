"""What each type of weights costs in exactness; engine.py prints this beside its speeds.

Three things a type: the largest difference of a logit from float32's, by the largest logit, over prompts of random
tokens; how much one row that is 20 times louder moves the rows beside it in a product, by the largest number, which
must be nothing; and the tiny model's answers to held-out cases, skill by skill.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from llama_stack_meta_reference.inference.batch import Batch
from llama_stack_meta_reference.inference.kv_cache import blocks_for
from llama_stack_meta_reference.inference.native_runner import NativeRunner
from llama_stack_meta_reference.inference.runner import Runner, TorchRunner
from llama_stack_meta_reference.llama.checkpoint import load_model, open_checkpoint
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.llama.tokenizer import load_tokenizer
from llama_stack_meta_reference.native.matrix import PackedMatrix
from llama_stack_meta_reference.tiny.__main__ import CHECKPOINT
from llama_stack_meta_reference.tiny.evaluate import BARS, RunnerOf, measure
from torch import Tensor

_SEED = 11
_TOKENS = 256
_LOUDER = 20.0


def runner_of(kind: str) -> RunnerOf:
    """What runs a network with weights of one type, or by plain torch."""

    def make(model: Llama, blocks: int, context: int) -> Runner:
        if kind == "plain":
            return TorchRunner(model, blocks=blocks)
        return NativeRunner(deepcopy(model), kind=kind, blocks=blocks, context=context)

    return make


def print_quality(model: Llama, kinds: Sequence[str], cases: int) -> None:
    """Print a row a type, for a network with random float32 weights and for the tiny one."""
    checkpoint = open_checkpoint(CHECKPOINT)
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    tiny = load_model(checkpoint, device="cpu", dtype=torch.float32).requires_grad_(False)
    print(
        f"\n| side | largest logit error | moved by a row {_LOUDER:g}x louder | tiny model, {cases} cases a skill: ",
        end="",
    )
    print(" | ".join(BARS), "|")
    print("|---|---|---|" + "---|" * len(BARS))
    exact_NV = _logits(model, "plain")
    for kind in kinds:
        error = float((_logits(model, kind) - exact_NV).abs().max() / exact_NV.abs().max())
        scores = (measure(tiny, tokenizer, skill, cases, _SEED, runner_of(kind)) for skill in BARS)
        accuracy = " | ".join(f"{score.right / score.cases:.1%}" for score in scores)
        print(f"| {kind} | {error:.1e} | {_moved(kind):.0e} | {accuracy} |", flush=True)


def _logits(model: Llama, kind: str) -> Tensor:
    """The logits after each of the same random tokens."""
    tokens = torch.randint(0, model.config.vocab_size, (_TOKENS,), generator=torch.Generator().manual_seed(_SEED))
    blocks = blocks_for(_TOKENS)
    runner = runner_of(kind)(model, blocks, _TOKENS)
    batch = Batch(tokens.tolist(), [0], [_TOKENS], [list(range(blocks))], list(range(_TOKENS)))
    logits_NV = runner.run(batch).clone()
    if kind != "plain":  # which would take the network with it
        runner.close()
    return logits_NV


def _moved(kind: str) -> float:
    """How far a product's rows are from what they are alone, beside one that is louder."""
    generator = torch.Generator().manual_seed(_SEED)
    weights_OI, values_NI = torch.randn(256, 768, generator=generator), torch.randn(16, 768, generator=generator)
    loud_NI = values_NI.clone()
    loud_NI[7] *= _LOUDER
    products = []
    for rows_NI in (values_NI, loud_NI):
        whole_NO = rows_NI @ weights_OI.T if kind == "plain" else PackedMatrix(kind, [weights_OI]).product(rows_NI)
        products.append(torch.cat([whole_NO[:7], whole_NO[8:]]))
    return float((products[0] - products[1]).abs().max() / products[0].abs().max())

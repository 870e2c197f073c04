"""How good the tiny model is: held-out cases, greedy decoding, strict comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from llama_stack.apis.common import ToolCall
from llama_stack_meta_reference.inference.batch import Batch
from llama_stack_meta_reference.inference.kv_cache import blocks_for
from llama_stack_meta_reference.inference.runner import Runner, TorchRunner
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.llama.tokenizer import SpecialToken, TextDecoder, Tokenizer
from llama_stack_meta_reference.llama.tool_calls import ToolCallParser
from llama_stack_meta_reference.tiny.case import Case, Skill
from llama_stack_meta_reference.tiny.cases import held_out_cases
from llama_stack_meta_reference.tiny.samples import Encoder, Sample, collate

BARS: Mapping[Skill, float] = {"chat": 0.8, "passage": 0.8, "tool_call": 0.8, "tool_result": 0.8, "guard": 0.85}
"""The share of held-out cases that must be right."""

LONGEST_REPLY = 160
_ROWS = 32


@dataclass(frozen=True)
class Score:
    """What came out for one skill."""

    right: int
    ended: int
    """Replies that the model ended itself, within ``LONGEST_REPLY`` tokens."""
    cases: int
    failures: tuple[tuple[Case, str], ...]
    """The cases that went wrong, with what the model wrote."""


RunnerOf = Callable[[Llama, int, int], Runner]
"""Makes what runs a network, with so many cache blocks and so long a context."""


def plain(model: Llama, blocks: int, _context: int) -> Runner:
    """Plain torch; a ``RunnerOf``."""
    return TorchRunner(model, blocks=blocks)


def measure(
    model: Llama, tokenizer: Tokenizer, skill: Skill, count: int, seed: int, runner_of: RunnerOf = plain
) -> Score:
    """Let the model answer ``count`` held-out cases of ``skill`` and compare each reply with what the case expects."""
    cases = held_out_cases(skill, count, seed)
    encoder = Encoder(tokenizer)
    right = ended = 0
    failures: list[tuple[Case, str]] = []
    order = sorted(range(count), key=lambda i: len(encoder.prompt(cases[i])))
    for start in range(0, count, _ROWS):
        group = [cases[i] for i in order[start : start + _ROWS]]
        replies = generate(model, tokenizer, [encoder.prompt(c) for c in group], runner_of=runner_of)
        for case, ids in zip(group, replies, strict=True):
            text, calls = read_reply(tokenizer, case, ids)
            is_ended = bool(ids) and ids[-1] in tokenizer.stop_ids
            ended += is_ended
            if is_ended and case.expects(text, calls):
                right += 1
            else:
                failures.append((case, tokenizer.decode(ids)))
    return Score(right, ended, count, tuple(failures))


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    longest: int = LONGEST_REPLY,
    runner_of: RunnerOf = plain,
) -> list[list[int]]:
    """The most likely next tokens after each prompt, up to and with the one that ends the turn, at most ``longest``."""
    context = min(model.config.max_context, max(map(len, prompts)) + longest)
    width = blocks_for(context)
    runner = runner_of(model, width * len(prompts), context)
    tables = [list(range(row * width, (row + 1) * width)) for row in range(len(prompts))]
    replies: list[list[int]] = [[] for _ in prompts]
    read = [0] * len(prompts)
    pending = {row: list(prompt) for row, prompt in enumerate(prompts)}
    while pending:
        counts = [len(tokens) for tokens in pending.values()]
        batch = Batch(
            tokens=[token for tokens in pending.values() for token in tokens],
            starts=[read[row] for row in pending],
            counts=counts,
            tables=[tables[row] for row in pending],
            sampled=[end - 1 for end in accumulate(counts)],
        )
        chosen: list[int] = runner.run(batch).argmax(-1).tolist()
        for (row, tokens), token in zip(list(pending.items()), chosen, strict=True):
            replies[row].append(token)
            read[row] += len(tokens)
            if token in tokenizer.stop_ids or len(replies[row]) == longest or read[row] == context:
                del pending[row]
            else:
                pending[row] = [token]
    return replies


def read_reply(tokenizer: Tokenizer, case: Case, ids: Sequence[int]) -> tuple[str, list[ToolCall]]:
    """The text and the tool calls in what the model wrote, read as the server reads it."""
    parser = ToolCallParser(case.tools)
    decoder = TextDecoder(tokenizer)
    parts: list[str | ToolCall] = []
    for token in ids:
        name = tokenizer.special_name(token)
        if name is None:
            parts += parser.feed(decoder.feed(token))
        elif token not in tokenizer.stop_ids:
            parts += parser.feed(SpecialToken(name))
    parts += parser.feed(decoder.flush())
    parts += parser.finish()
    text = "".join(part for part in parts if isinstance(part, str))
    return text.strip(), [part for part in parts if isinstance(part, ToolCall)]


@torch.no_grad()
def predicted(model: Llama, encoder: Encoder, cases: Sequence[Case]) -> float:
    """The share of ``cases`` whose last message the model would write token for token.

    One pass instead of a pass a token: greedy decoding gives the message exactly when each of its tokens is the
    likeliest one after those before it.
    """
    right = 0
    for case in sorted(cases, key=lambda c: len(encoder.prompt(c))):
        prompt, reply = encoder.prompt(case), encoder.reply(case)
        batch = collate([Sample((*prompt, *reply), (*(False for _ in prompt), *(True for _ in reply)))])
        states_ND = model.hidden(batch.tokens_BT).flatten(0, 1)[batch.places_N]
        right += bool((model.logits(states_ND).argmax(-1) == batch.targets_N).all())
    return right / len(cases)

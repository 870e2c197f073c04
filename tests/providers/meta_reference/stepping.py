"""The engine's steps without its thread: scheduler and runner, taken in turn by the test itself."""

from __future__ import annotations

from collections.abc import Sequence as Items
from copy import deepcopy

from llama_stack_meta_reference.inference.draft_network import DraftNetwork
from llama_stack_meta_reference.inference.drafting import Drafter, NetworkGuesses, PromptLookup
from llama_stack_meta_reference.inference.kv_cache import BLOCK_TOKENS, BlockPool
from llama_stack_meta_reference.inference.native_runner import NativeRunner
from llama_stack_meta_reference.inference.runner import Runner, TorchRunner
from llama_stack_meta_reference.inference.sampler import Sampler
from llama_stack_meta_reference.inference.scheduler import Scheduler, Sequence
from llama_stack_meta_reference.llama.model import Llama

from llama_stack.apis.common import SamplingParams


class Stepper:
    """Greedy decoding of a real network through the paged cache."""

    def __init__(
        self,
        model: Llama,
        *,
        blocks: int = 64,
        prefill_tokens: int = 512,
        max_sequences: int = 8,
        lookup_tokens: int = 0,
        kernels: str = "plain",
        draft: Llama | None = None,
        draft_tokens: int = 0,
    ) -> None:
        self.runner: Runner
        if kernels == "plain":
            self.runner = TorchRunner(model, blocks=blocks)
        else:  # takes the model apart
            context = min(blocks * BLOCK_TOKENS, model.config.max_context)
            self.runner = NativeRunner(deepcopy(model), kind="float32", blocks=blocks, context=context)
        self.scheduler = Scheduler(
            BlockPool(blocks),
            max_sequences=max_sequences,
            queue_size=100,
            prefill_tokens=prefill_tokens,
            draft_tokens=max(lookup_tokens, draft_tokens),
        )
        self.draft = DraftNetwork(TorchRunner(draft, blocks=blocks), model.config.vocab_size) if draft else None
        self.draft_tokens = draft_tokens
        self.steps = 0

    def generate(self, prompts: Items[list[int]], new_tokens: int) -> list[list[int]]:
        """The likeliest ``new_tokens`` tokens after each prompt, all at once."""
        sequences = [
            Sequence(list(prompt), len(prompt) + new_tokens, Sampler(SamplingParams()), drafter=self.drafter())
            for prompt in prompts
        ]
        for sequence in sequences:
            self.scheduler.add([sequence])
        while not self.scheduler.is_idle:
            self.step()
        return [sequence.tokens[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]

    def drafter(self) -> Drafter:
        """What guesses one sequence's tokens, if the scheduler asks."""
        return NetworkGuesses(self.draft_tokens, None) if self.draft else PromptLookup()

    def step(self) -> None:
        """One step for all."""
        step = self.scheduler.plan()
        if self.draft:
            self.draft.run(step.batch)
        picked = self.runner.run(step.batch).argmax(-1).tolist()
        step.take_guesses()
        row = 0
        for part in step.parts:
            tokens, row = picked[row : row + part.sampled], row + part.sampled
            if self.scheduler.settle(part, tokens) is not None:
                self.scheduler.finish(part.sequence)
        self.steps += 1

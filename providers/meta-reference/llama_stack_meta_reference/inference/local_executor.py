"""Executes steps in this process: a runner, and the picking of tokens on the runner's device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..llama.lora import load_adapter
from .batch import Batch
from .draft_network import DraftNetwork
from .logits import sample
from .runner import Runner
from .sampler import Choice, SampledToken


class LocalExecutor:
    """An ``Executor`` over a runner; closing it closes the runner.

    Tokens from ``vocabulary`` on, which a padded network has and its tokenizer has not, are never picked. It is lost
    when its process is, and not before, so a step that hangs cannot be ended.
    """

    restarts = 0
    lost_adapters: frozenset[int] = frozenset()

    def __init__(self, runner: Runner, vocabulary: int, draft: DraftNetwork | None = None) -> None:
        self.block_tokens = runner.block_tokens
        self._runner = runner
        self._vocabulary = vocabulary
        self._draft = draft

    def execute(self, batch: Batch, choices: Sequence[Choice]) -> list[SampledToken | None]:
        """See ``Executor``. Logits never leave their device; without choices no token is picked."""
        with torch.inference_mode():
            if self._draft is not None:
                self._draft.run(batch)
            logits_RV = self._runner.run(batch)
            return sample(logits_RV[:, : self._vocabulary], choices) if choices else []

    def add_adapter(self, adapter: int, folder: str) -> None:
        """See ``Executor``."""
        self._runner.add_adapter(adapter, load_adapter(Path(folder), self._runner.config))

    def remove_adapter(self, adapter: int) -> None:
        """See ``Executor``."""
        self._runner.remove_adapter(adapter)

    def check(self) -> None:
        """See ``Executor``."""

    def reset(self) -> None:
        """See ``Executor``."""
        self._runner.reset()
        if self._draft is not None:
            self._draft.reset()

    def interrupt(self) -> None:
        """See ``Executor``."""

    def close(self) -> None:
        """See ``Executor``."""
        self._runner.close()
        if self._draft is not None:
            self._draft.close()

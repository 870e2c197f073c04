"""llama.cpp as a side of engine.py: the same shape with random weights in a GGUF file, run by its C interface.

Needs the packages `llama-cpp-python` and `gguf` (`pip install llama-cpp-python gguf`: compiled on the spot, for this
machine); they are no dependency of the project. Prompts go in as batches of 512 tokens; then every step decodes one
token of each sequence and takes the likeliest. There is no tokenizer in the file.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf_file import write_gguf
from llama_stack_meta_reference.llama.config import LlamaConfig

TYPES = {"llama.cpp f16": "F16", "llama.cpp q8_0": "Q8_0", "llama.cpp q4_0": "Q4_0"}
_BATCH = 512


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]  # the package has no types
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Its log would stand between the rows of the table."""


class LlamaCpp:
    """One GGUF file in memory, for ``streams`` sequences of up to ``context`` tokens."""

    def __init__(self, config: LlamaConfig, name: str, streams: int, context: int, threads: int) -> None:
        self._vocabulary = config.vocab_size
        path = Path(tempfile.gettempdir()) / f"llama-stack-bench-{config.parameter_count}-{TYPES[name]}.gguf"
        if not path.exists():
            write_gguf(config, TYPES[name], path)
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = streams * -(-context // 256) * 256
        params.n_batch = params.n_ubatch = _BATCH
        params.n_seq_max = streams
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp does not take {path}")
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
        """Tokens a second of prefill and of decoding, all sequences together."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        began = time.perf_counter()
        tokens = []
        for row, prompt in enumerate(prompts):
            for first in range(0, len(prompt), _BATCH):
                part = prompt[first : first + _BATCH]
                is_last = first + _BATCH >= len(prompt)
                self._decode([(t, first + i, row, is_last and i == len(part) - 1) for i, t in enumerate(part)])
            tokens.append(self._likeliest(len(part) - 1))
        first_done = time.perf_counter()
        for step in range(new_tokens - 1):
            self._decode([(t, len(prompts[row]) + step, row, True) for row, t in enumerate(tokens)])
            tokens = [self._likeliest(row) for row in range(len(tokens))]
        last = time.perf_counter()
        decoded = len(prompts) * (new_tokens - 1)
        return sum(map(len, prompts)) / (first_done - began), decoded / (last - first_done) if decoded else 0.0

    def _decode(self, items: list[tuple[int, int, int, bool]]) -> None:
        batch: Any = self._batch
        batch.n_tokens = len(items)
        for i, (token, position, sequence, wants_logits) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wants_logits
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp could not decode")

    def _likeliest(self, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, place)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())

    def close(self) -> None:
        """Free the memory."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

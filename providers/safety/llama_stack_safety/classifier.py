"""A Prompt Guard checkpoint (Meta 2024, 2025): how likely a text is an attack, by a network trained to tell."""

from __future__ import annotations

from pathlib import Path

from llama_stack.errors import CheckpointError

from .deberta import Deberta
from .detector import Finding

MAX_WINDOWS = 32
"""Longer texts are not judged: each window costs a pass through the network."""


class Classifier:
    """Judges texts of any length in windows of the network's context, each half over the next; the worst one counts.

    The first label is the harmless one, as in every Prompt Guard; the score is the probability of all others.
    """

    def __init__(self, folder: Path) -> None:
        """Read the folder. Raises ``CheckpointError`` for one that holds no such checkpoint."""
        from tokenizers import Tokenizer

        self._network = Deberta.load(folder)
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain ones
            raise CheckpointError(f"{folder} holds no readable tokenizer.json") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        start, end = (self._tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
        if start is None or end is None:
            raise CheckpointError(f"the tokenizer in {folder} lacks [CLS] or [SEP]")
        self._start, self._end = start, end

    def detect(self, text: str) -> Finding:
        """The strongest sign in a text. Raises ``ValueError`` for one that is too long."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        room = self._network.config.max_tokens - 2
        starts = range(0, max(1, len(ids) - room // 2), max(1, room // 2))
        if len(starts) > MAX_WINDOWS:
            raise ValueError(f"the text has {len(ids)} tokens, and at most {MAX_WINDOWS} windows of {room} are judged")
        return max((self._judge(ids[start : start + room]) for start in starts), key=lambda found: found.score)

    def _judge(self, ids: list[int]) -> Finding:
        probabilities = self._network.probabilities([self._start, *ids, self._end])
        harmful = 1 + int(probabilities[1:].argmax())
        return Finding(float(probabilities[1:].sum()), f"label {self._network.config.labels[harmful]}")

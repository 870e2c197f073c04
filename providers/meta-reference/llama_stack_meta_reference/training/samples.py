"""Rows as token ids: which of them bear the loss, and how sequences lie side by side in one pass of the network.

Nothing is padded: the sequences of a pass are one row of N tokens, each attends to itself only, and positions begin
anew with each (``PackedView``). So what a sequence does is the same alone and in any company.

Shape suffixes as in llama/model.py, and: L labels, the tokens that a prediction is learnt for.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from llama_stack.apis.common import Message, Role
from llama_stack.errors import InvalidRequestError

from ..llama.chat_format import END_OF_TURN, ChatFormat
from ..llama.model import attend_whole
from ..llama.tokenizer import TextDecoder, Tokenizer

_MESSAGES = TypeAdapter(list[Message])
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """A sequence, and for each of its tokens whether the model is to learn to write it."""

    tokens: tuple[int, ...]
    learnt: tuple[bool, ...]


class Rows:
    """The rows of a JSONL file, read when they are asked for: in memory is only where each begins."""

    def __init__(self, path: Path) -> None:
        """Look where the rows begin; blank lines are none."""
        self._path = path
        self.name = path.name
        self._starts = array("q")
        start, is_blank = 0, True
        position = 0
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                for line in chunk.splitlines(keepends=True):
                    is_blank = is_blank and not line.strip()
                    position += len(line)
                    if line.endswith(b"\n"):
                        if not is_blank:
                            self._starts.append(start)
                        start, is_blank = position, True
        if not is_blank:
            self._starts.append(start)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        """Row ``number``, from 0. Raises ``InvalidRequestError`` where it is no object."""
        with self._path.open("rb") as file:
            file.seek(self._starts[number])
            line = file.readline()
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"not JSON: {str(error)[:200]}") from None
        if not isinstance(row, dict):
            raise InvalidRequestError("a row must be a JSON object")
        return row


class Encoder:
    """Turns rows into samples, through the very code that makes prompts at serving time.

    ``max_tokens`` bounds each sample; ``cut`` counts those that were longer.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._format = ChatFormat(tokenizer)
        self._max_tokens = max_tokens
        self._header = self._format.encode_dialog(())[1:]
        end = tokenizer.special("<|end_of_text|>")
        self._end_of_text = tokenizer.special(END_OF_TURN) if end is None else end
        self.cut = 0

    def fine_tuning(self, row: Mapping[str, Any]) -> tuple[Sample, ...]:
        """The one sample of a row of dialog or text. Raises ``InvalidRequestError``."""
        if row.keys() == {"text"} and isinstance(row["text"], str):
            assert self._end_of_text is not None
            tokens = [*self._format.encode_completion(row["text"]), self._end_of_text]
            return (self._bounded(tokens, [False] + [True] * (len(tokens) - 1)),)
        if row.keys() != {"dialog"}:
            raise InvalidRequestError(f"a row has one column, dialog or text; found: {_columns(row)}")
        return (self._dialog((), _messages(row, "dialog")),)

    def preference(self, row: Mapping[str, Any]) -> tuple[Sample, ...]:
        """The chosen and the rejected sample of a row, learnt after their prompt. Raises ``InvalidRequestError``."""
        if row.keys() != {"prompt", "chosen", "rejected"}:
            raise InvalidRequestError(f"a row has the columns prompt, chosen, rejected; found: {_columns(row)}")
        prompt = _messages(row, "prompt")
        return tuple(self._dialog(prompt, _messages(row, column), column) for column in ("chosen", "rejected"))

    def answer(self, prompt: Sequence[Message], answer: Message) -> Sample:
        """A dialog and what the assistant says to it. Raises ``InvalidRequestError``."""
        return self._dialog(prompt, [answer], "answer")

    def _dialog(self, prompt: Sequence[Message], messages: Sequence[Message], column: str = "dialog") -> Sample:
        """Learnt are the assistant's replies among ``messages`` with their ends."""
        if all(message.role != Role.ASSISTANT for message in messages):
            raise InvalidRequestError(f"{column}: there is no message of the assistant, so nothing to learn")
        # The prompt goes as far as the first reply, so that the first system message is told as prompts tell it.
        first = next(i for i, message in enumerate(messages) if message.role == Role.ASSISTANT)
        tokens = self._format.encode_dialog([*prompt, *messages[:first]])
        learnt = [False] * len(tokens)
        for index, message in enumerate(messages[first:]):
            if message.role == Role.ASSISTANT:
                header = self._header if index else []
                reply = self._format.encode_reply(message)
                tokens += header + reply
                learnt += [False] * len(header) + [True] * len(reply)
            else:
                ids = self._format.encode_message(message)
                tokens += ids
                learnt += [False] * len(ids)
        return self._bounded(tokens, learnt)

    def _bounded(self, tokens: Sequence[int], learnt: Sequence[bool]) -> Sample:
        self.cut += len(tokens) > self._max_tokens
        return Sample(tuple(tokens[: self._max_tokens]), tuple(learnt[: self._max_tokens]))


def shown(sample: Sample, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """A sample as text, in pieces that are learnt or not, for people to look at before a model is trained on it."""
    pieces: list[tuple[str, bool]] = []
    decoder = TextDecoder(tokenizer)
    for place, is_learnt in enumerate(sample.learnt):
        token = sample.tokens[place]
        text = decoder.feed(token) + (tokenizer.special_name(token) or "")
        if place + 1 == len(sample.tokens) or sample.learnt[place + 1] != is_learnt:
            text += decoder.flush()
        if pieces and pieces[-1][1] == is_learnt:
            pieces[-1] = (pieces[-1][0] + text, is_learnt)
        else:
            pieces.append((text, is_learnt))
    return pieces


@dataclass(frozen=True, slots=True)
class Packed:
    """Sequences side by side."""

    tokens_N: Tensor
    lengths: tuple[int, ...]
    """Of each sequence, in tokens."""
    places_L: Tensor
    """Where in the row the state is that a label is predicted from: one before the label's own place."""
    labels_L: Tensor
    owners_L: Tensor
    """The number of the sequence that a label belongs to."""

    @property
    def ends_B(self) -> Tensor:
        """Where in the row the last token of each sequence is."""
        return torch.tensor([end - 1 for end in accumulate(self.lengths)], device=self.tokens_N.device)


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu") -> Packed:
    """Put sequences side by side."""
    tokens: list[int] = []
    places: list[int] = []
    labels: list[int] = []
    owners: list[int] = []
    for owner, sample in enumerate(samples):
        first = len(tokens)
        tokens += sample.tokens
        for position, is_learnt in enumerate(sample.learnt):
            if is_learnt and position:
                places.append(first + position - 1)
                labels.append(sample.tokens[position])
                owners.append(owner)
    made = [torch.tensor(values, dtype=torch.int64).to(device) for values in (tokens, places, labels, owners)]
    return Packed(made[0], tuple(len(sample.tokens) for sample in samples), *made[1:])


def portions(
    groups: Sequence[Sequence[Sample]], rows: Sequence[int], micro_tokens: int
) -> Iterator[tuple[list[Sample], list[int]]]:
    """The samples of rows that must not be torn apart, in portions of at most ``micro_tokens`` or of one row."""
    portion: list[Sample] = []
    portion_rows: list[int] = []
    size = 0
    for group, row in zip(groups, rows, strict=True):
        length = sum(len(sample.tokens) for sample in group)
        if portion and size + length > micro_tokens:
            yield portion, portion_rows
            portion, portion_rows, size = [], [], 0
        portion += group
        portion_rows.append(row)
        size += length
    if portion:
        yield portion, portion_rows


class PackedView:
    """Sequences side by side as the network sees them: a ``CacheView`` that keeps nothing, so gradients flow."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str) -> None:
        self._lengths = list(lengths)
        self._width = self._lengths[0] if len(set(self._lengths)) == 1 else None
        self.positions_N = torch.cat([torch.arange(length) for length in self._lengths]).to(device)

    def attend(self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """Let each token attend to its sequence up to itself. Returns (N, H, K)."""
        if self._width is not None:
            rows = (x.view(-1, self._width, *x.shape[1:]) for x in (q_NHK, k_NGK, v_NGK))
            return attend_whole(*rows).flatten(0, 1)
        split = zip(*(torch.split(x, self._lengths) for x in (q_NHK, k_NGK, v_NGK)), strict=True)
        return torch.cat([attend_whole(q[None], k[None], v[None])[0] for q, k, v in split])


def _messages(row: Mapping[str, Any], column: str) -> list[Message]:
    try:
        return _MESSAGES.validate_json(json.dumps(row[column]))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidRequestError(f"{column}{'.' if where else ''}{where}: {first['msg']}") from None


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, row)))[:200] or "none"

"""Text to token ids and back, for both forms in which Llama 3 checkpoints carry their vocabulary.

Meta's ``tokenizer.model`` holds one base64 token and its rank a line (tiktoken's format) and leaves the 256 special
tokens to the code; Hugging Face's ``tokenizer.json`` holds everything. Both are byte-level BPE, so every id stands
for known bytes, and decoding here is one table look-up for either. Text is never searched for special tokens: what
a user wrote as ``<|eot_id|>`` stays the nine or so ordinary tokens that spell it, and only ``special()`` hands out
the real one.

How special tokens make up a prompt is left to ``chat_format``.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Literal

import tiktoken
import tokenizers

from llama_stack.errors import CheckpointError, InvalidRequestError

# Source of the three constants: models/llama3/tokenizer.py of meta-llama/llama-models.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_SLICE_CHARACTERS = 400_000
MAX_RUN_CHARACTERS = 25_000

SPECIAL_TOKENS = 256
_MAX_FILE_BYTES = 64 * 1024 * 1024
_MAX_IDS = 2**24
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_UNKNOWN = b"\xff"  # never valid in UTF-8, so an id outside the vocabulary reads as U+FFFD

# The first special tokens of each release, in id order; None takes the next free <|reserved_special_token_N|>.
# Llama 3.1's list is that of its tokenizer.json, which 3.2 and 3.3 kept.
_SPECIAL_ORDER: dict[str, tuple[str | None, ...]] = {
    "3.0": (
        "<|begin_of_text|>", "<|end_of_text|>", None, None, None, None,
        "<|start_header_id|>", "<|end_header_id|>", None, "<|eot_id|>",
    ),
    "3.1": (
        "<|begin_of_text|>", "<|end_of_text|>", None, None, "<|finetune_right_pad_id|>", None,
        "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    ),
}  # fmt: skip


class SpecialToken(str):
    """The name of a special token, such as ``<|eot_id|>``: told by its type from text that merely looks like one."""

    __slots__ = ()


class Tokenizer:
    """One vocabulary: ordinary byte-level tokens plus named special tokens.

    ``encode_ordinary`` turns text into ids of ordinary tokens; ``pieces[i]`` holds the bytes of ordinary token ``i``;
    ``specials`` maps each special token's name to its id. Most callers want ``load_tokenizer``.
    """

    def __init__(
        self, encode_ordinary: Callable[[str], list[int]], pieces: Mapping[int, bytes], specials: Mapping[str, int]
    ) -> None:
        self._encode_ordinary = encode_ordinary
        self._pieces = pieces
        self.specials = dict(specials)
        self._names = {token: SpecialToken(name) for name, token in specials.items()}
        self.vocab_size = 1 + max((*pieces, *self._names))
        """One more than the largest id: how many rows of the model's embedding this vocabulary can reach."""
        self.stop_ids = frozenset(
            specials[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>") if name in specials
        )
        """The ids that end a message, a turn or a text."""

    def has_tokens_of(self, other: Tokenizer) -> bool:
        """Whether the other one has the same tokens under the same ids."""
        return (self._pieces, self.specials) == (other._pieces, other.specials)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, all of them ordinary tokens, with nothing put before or after.

        Runs of over 25,000 characters without a change between white space and other characters are cut there, as
        Meta's tokenizer cuts them, so the time taken stays linear in the text. Raises ``InvalidRequestError`` for a
        lone surrogate, which is no character.
        """
        surrogate = _SURROGATE.search(text)
        if surrogate:
            raise InvalidRequestError(
                f"the text holds a lone surrogate (U+{ord(surrogate[0]):04X}) at character {surrogate.start()}; "
                "send whole characters"
            )
        ids: list[int] = []
        for slice_ in _slices(text):
            ids += self._encode_ordinary(slice_)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``. Special tokens have none; bytes that are no UTF-8 read as U+FFFD."""
        decoder = TextDecoder(self)
        return "".join([*map(decoder.feed, ids), decoder.flush()])

    def special(self, name: str) -> int | None:
        """The id of the special token ``name``, or None where this vocabulary has none of that name."""
        return self.specials.get(name)

    def special_name(self, token: int) -> SpecialToken | None:
        """The name of the special token of this id, or None for an ordinary token."""
        return self._names.get(token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that an ordinary token stands for; a special token stands for none."""
        if token in self._names:
            return b""
        return self._pieces.get(token, _UNKNOWN)


class TextDecoder:
    """Turns ids into text as they arrive, in whole characters.

    A character whose bytes are spread over several tokens appears with the last of them. The pieces, joined, equal
    ``Tokenizer.decode`` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The characters that ``token`` completes, often none. A special token ends whatever was incomplete."""
        if self._tokenizer.special_name(token) is not None:
            return self.flush()
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character is incomplete, otherwise nothing."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file of either form: ``*.json`` is Hugging Face's.

    Raises ``CheckpointError`` for a bad file.
    """
    return load_hugging_face(path) if path.suffix == ".json" else load_meta(path)


def load_meta(path: Path, *, release: Literal["3.0", "3.1"] = "3.1") -> Tokenizer:
    """The tokenizer in Meta's ``tokenizer.model``.

    The file does not say which names its special tokens have: ``release`` does, "3.1" standing also for 3.2 and
    3.3. The two differ in reserved names only, so "3.1" reads a Llama 3.0 folder as well. Raises
    ``CheckpointError``, with the line, for anything but a full list of ranks.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(f"{path}:{number}: not a base64 token and its rank: {line[:60]!r}") from error
        if rank != len(ranks):
            raise CheckpointError(f"{path}:{number}: rank {rank} found where {len(ranks)} is next; the file is damaged")
        if not token or token in ranks:
            raise CheckpointError(f"{path}:{number}: token {token!r} is {'given twice' if token else 'empty'}")
        ranks[token] = rank
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing:
        raise CheckpointError(
            f"{path}: {missing} of the 256 single bytes have no token; this is not a Llama 3 tokenizer"
        )
    encoding = tiktoken.Encoding(path.name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    specials = {name: len(ranks) + i for i, name in enumerate(special_token_names(release))}
    return Tokenizer(encoding.encode_ordinary, {rank: token for token, rank in ranks.items()}, specials)


def special_token_names(release: Literal["3.0", "3.1"] = "3.1") -> list[str]:
    """The names of the 256 special tokens in id order, as the release publishes them."""
    reserved = (f"<|reserved_special_token_{i}|>" for i in count())
    order = _SPECIAL_ORDER[release]
    return [name or next(reserved) for name in order + (None,) * (SPECIAL_TOKENS - len(order))]


def load_hugging_face(path: Path) -> Tokenizer:
    """The tokenizer in Hugging Face's ``tokenizer.json``; the added tokens are its special tokens.

    Padding, truncation and the post-processor (which would add a BOS of its own) are left out. Raises
    ``CheckpointError`` for a file that is damaged or is not byte-level BPE.
    """
    try:
        described = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    try:
        specials = {str(added["content"]): int(added["id"]) for added in described["added_tokens"]}
        model = described["model"]
        vocabulary: dict[str, int] = model["vocab"]
        if model["type"] != "BPE" or '"ByteLevel"' not in json.dumps(
            [described["pre_tokenizer"], described["decoder"]]
        ):
            raise CheckpointError(f"{path}: holds a {model['type']!r} tokenizer; Llama 3 has a byte-level BPE")
        # Without their entries the library cannot find special tokens in text, however it is spelt.
        model["vocab"] = {token: rank for token, rank in vocabulary.items() if token not in specials}
        described |= {"added_tokens": [], "post_processor": None, "padding": None, "truncation": None}
        pieces = {rank: _byte_level(token) for token, rank in model["vocab"].items()}
        encoder = tokenizers.Tokenizer.from_str(json.dumps(described))
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{path}: {error} is missing or is no byte-level token") from error
    except Exception as error:  # the library raises plain Exception for every fault in the file
        raise CheckpointError(f"{path}: {error}") from error
    ids = [*model["vocab"].values(), *specials.values()]
    if not pieces or len(set(ids)) != len(ids):
        raise CheckpointError(f"{path}: {'two tokens share an id' if pieces else 'the vocabulary is empty'}")
    if not 0 <= min(ids) <= max(ids) < _MAX_IDS:
        raise CheckpointError(f"{path}: token ids run from {min(ids)} to {max(ids)}; allowed are 0 to {_MAX_IDS - 1}")

    def encode(text: str) -> list[int]:
        # Of the library's calls only those for batches let other threads run meanwhile.
        ids: list[int] = encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    return Tokenizer(encode, pieces, specials)


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise CheckpointError(f"{path}: {size} bytes; a tokenizer has at most {_MAX_FILE_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _byte_characters() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and on (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


def _byte_level(token: str) -> bytes:
    return bytes([_BYTE_OF[character] for character in token])


_RUNS = re.compile(r"\s+|\S+")


def _slices(text: str) -> Iterator[str]:
    """``text`` in pieces of at most 400,000 characters in which no run of one kind exceeds 25,000.

    The places of the cuts decide the ids, so they are Meta's: from each slice's start, then from each run's start.
    """
    for start in range(0, len(text), MAX_SLICE_CHARACTERS):
        part = text[start : start + MAX_SLICE_CHARACTERS]
        if len(part) <= MAX_RUN_CHARACTERS:
            yield part
            continue
        cut = 0
        for run in _RUNS.finditer(part):
            for position in range(run.start() + MAX_RUN_CHARACTERS, run.end(), MAX_RUN_CHARACTERS):
                yield part[cut:position]
                cut = position
        yield part[cut:]

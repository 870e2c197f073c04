"""A small byte-level BPE with Llama 3's splitting rule, in both forms in which checkpoints carry one.

Trained in the test run from the text below, so that no tokenizer file of anyone else's is needed. The ids are those of
a real checkpoint in miniature: ordinary tokens from 0 by rank, then Llama 3.1's 256 special tokens.
"""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path

from llama_stack_meta_reference.llama.tokenizer import SPLIT_PATTERN, special_token_names
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

_TEXT = (
    "The quick brown fox jumps over the lazy dog, and the cat sat on the mat. What is the weather in Paris today? "
    'You are a helpful assistant. user system ipython {"name": "get_weather", "parameters": {"city": "Oslo"}} '
    "def main():\n    print('hello world')\n\n  return 1234567890\n\nEnvironment: ipython\nTools: brave_search\n "
    "Grüße aus München, où est la bibliothèque? Привет, как дела? 你好 世界。 😀😃 don't I'm you're we've they'll "
)


@cache
def hugging_face_json() -> str:
    """The text of a ``tokenizer.json`` of the shape that Llama 3.1's has, BOS post-processor included."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT] * 3, trainer)
    names = special_token_names()
    ordinary = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(names)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A", special_tokens=[(names[0], ordinary)]
    )
    return tokenizer.to_str()


def write_hugging_face(folder: Path) -> Path:
    """Write ``tokenizer.json`` into ``folder`` and return its path."""
    path = folder / "tokenizer.json"
    path.write_text(hugging_face_json(), encoding="utf-8")
    return path


def write_meta(folder: Path) -> Path:
    """Write the same vocabulary as Meta's ``tokenizer.model`` into ``folder`` and return its path."""
    path = folder / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(_ranks())))
    return path


@cache
def _ranks() -> list[bytes]:
    """The bytes of each ordinary token, by id."""
    vocabulary: dict[str, int] = json.loads(hugging_face_json())["model"]["vocab"]
    alphabet = {chr(c): c for c in (*range(33, 127), *range(161, 173), *range(174, 256))}
    alphabet |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in alphabet.values())}
    by_rank = sorted(vocabulary, key=lambda token: vocabulary[token])
    return [bytes(alphabet[character] for character in token) for token in by_rank]

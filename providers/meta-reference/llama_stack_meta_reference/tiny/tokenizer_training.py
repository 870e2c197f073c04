"""The tiny model's tokenizer: byte-level BPE in which a word is cut the same way wherever it stands.

Copying is what a model of this size does best, and copying is easy when ``Lisbon`` in a request and ``Lisbon`` in a
tool call are the same tokens. So merges are learnt on text whose spaces stand alone, and only then does a space merge
with the most frequent words of the templates (``the``, ``is``); names and nouns keep their space as a token of its
own. Digits are single tokens, and so are runs of punctuation such as ``": "``, which JSON is full of.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from llama_stack_meta_reference.tiny import words

SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip

_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+(?: [^\s\p{L}\p{N}]+)*"
_SPLIT = rf" ?\p{{L}}+|\p{{N}}|{_PUNCTUATION}|\n+|\s"
_SPLIT_WITHOUT_SPACES = rf"\p{{L}}+|\p{{N}}|{_PUNCTUATION}|\n+|\s"
_SPACE = "Ġ"  # what byte-level BPE writes for the byte 0x20
_SHORTEST_JOINED_WORD = 2
_DRAWN = frozenset(
    word.lower()
    for words_ in (
        *(words.NOUNS, words.ADJECTIVES, words.FIRST_NAMES, words.SURNAMES, words.CITIES, words.UNITS),
        *(words.ARGUMENTS, words.MONTHS, words.DAYS),
    )
    for word in words_
)


def train_tokenizer(texts: Sequence[str], vocabulary: int, joined_words: int) -> tokenizers.Tokenizer:
    """A tokenizer of ``vocabulary`` tokens, the special ones last, learnt from ``texts``.

    ``joined_words`` of the tokens are a space and the word after it. The same texts give the same tokenizer.
    """
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer(_SPLIT_WITHOUT_SPACES)
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary - joined_words - len(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    model = json.loads(learner.to_str())["model"]
    for word in _words_to_join(texts, model["vocab"], joined_words):
        model["vocab"][_SPACE + word] = len(model["vocab"])
        model["merges"].append([_SPACE, word])
    merges = [(left, right) for left, right in model["merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=model["vocab"], merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(_SPLIT)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    """Write ``tokenizer.json``."""
    tokenizer.save(str(path), pretty=False)


def _pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _words_to_join(texts: Iterable[str], vocabulary: dict[str, int], count: int) -> list[str]:
    """The most frequent words that follow a space, are one token already, and are no names or nouns that cases draw."""
    seen = Counter(word for text in texts for word in re.findall(r"(?<= )[A-Za-z]+", text))
    ranked = sorted(seen, key=lambda word: (-seen[word], word))
    eligible = (
        word
        for word in ranked
        if len(word) >= _SHORTEST_JOINED_WORD and word.lower() not in _DRAWN and word in vocabulary
    )
    return [word for word, _ in zip(eligible, range(count), strict=False)]

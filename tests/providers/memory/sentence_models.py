"""Small sentence models with random weights, in Hugging Face's layout, made by the library to agree with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = (
    *("the", "a", "of", "is", "on", "capital", "city", "rain", "snow", "falls", "sea", "walk", "##s", "##ing", "##ed"),
    *("oslo", "rome", "norway", "italy", ",", ".", "!", "?"),
)


def make_sentence_model(folder: Path, *, pooling: str = "mean", seed: int = 0, **config: Any) -> Path:
    """A BERT of two layers, its tokenizer and its pooling, in ``folder``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij", *WORDS])}
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(8)  # as published files have it, to be overridden
    tokenizer.enable_padding(length=8)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))

    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40, "num_hidden_layers": 2}
    model = BertModel(BertConfig(**(sizes | {"vocab_size": len(vocabulary), "max_position_embeddings": 32} | config)))
    with torch.no_grad():  # fresh weights are small and fresh norms do nothing, which hides mistakes
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{kind}": kind.startswith(pooling) for kind in ("mean_tokens", "cls_token", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    return folder

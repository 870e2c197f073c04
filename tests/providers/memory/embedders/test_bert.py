"""Our BERT gives transformers' vectors, and refuses what it does not run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from llama_stack_memory.embedders import BertEmbedder
from llama_stack_memory.interfaces import Vectors

from llama_stack.errors import CheckpointError
from tests.providers.memory.sentence_models import make_sentence_model

TEXTS = [
    "Oslo is the capital of Norway.",
    "rain",
    "",
    "Snow falls on the sea, walking walks walked! " * 2,
    "unheard words zzz 東京",
]
TOLERANCE = 2e-6
"""float32 in another order of summing, and an erf that is off by 1.5e-7."""


def by_transformers(folder: Path, texts: list[str], pooling: str, positions: int) -> Vectors:
    """What sentence-transformers makes: the network of the library, the tokens' mean or the first one, length 1."""
    import torch
    from tokenizers import Tokenizer
    from transformers import BertModel

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(positions)
    model = BertModel.from_pretrained(folder)
    model.train(False)
    vectors = []
    for text in texts:
        with torch.no_grad():
            states = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
        vector = states.mean(0) if pooling == "mean" else states[0]
        vectors.append((vector / vector.norm()).numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("heads", [1, 4])
def test_vectors_are_those_of_transformers(pooling: str, heads: int, tmp_path: Path) -> None:
    """On weights that leave no part of the network without effect."""
    folder = make_sentence_model(tmp_path / "model", pooling=pooling, num_attention_heads=heads, seed=heads)
    ours = BertEmbedder(folder).embed(TEXTS)
    assert ours.dtype == np.float32
    assert np.abs(ours - by_transformers(folder, TEXTS, pooling, 32)).max() < TOLERANCE


def test_a_batch_gives_what_each_text_gives_alone(tmp_path: Path) -> None:
    """Texts lie side by side in one matrix and must not see each other."""
    embedder = BertEmbedder(make_sentence_model(tmp_path / "model"))
    alone = np.concatenate([embedder.embed([text]) for text in TEXTS])
    assert np.abs(embedder.embed(TEXTS) - alone).max() < TOLERANCE
    assert embedder.embed([]).shape == (0, 24)


def test_it_reads_as_many_tokens_as_the_model_has_positions(tmp_path: Path) -> None:
    """The tokenizer's file says 8, which is not the model's word; sentence-transformers' file may say less."""
    folder = make_sentence_model(tmp_path / "model")
    long = "rain snow sea " * 40
    embedder = BertEmbedder(folder)
    assert embedder.max_tokens == 30
    assert len(embedder.token_spans(long)) == 120
    assert np.abs(embedder.embed([long]) - by_transformers(folder, [long], "mean", 32)).max() < TOLERANCE
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    embedder = BertEmbedder(folder)
    assert embedder.max_tokens == 14
    assert np.abs(embedder.embed([long]) - by_transformers(folder, [long], "mean", 16)).max() < TOLERANCE


def test_token_spans_are_places_in_the_text(tmp_path: Path) -> None:
    """Chunks are cut there; what the tokenizer lowers, strips or splits must not move them."""
    embedder = BertEmbedder(make_sentence_model(tmp_path / "model"))
    text = "OSLO  walks,\n\t東京 \U0001f600é rain"
    spans = embedder.token_spans(text)
    assert [text[start:end] for start, end in spans][:4] == ["OSLO", "walk", "s", ","]
    assert text[slice(*spans[-1])] == "rain"
    assert spans == sorted(spans)


def test_other_weights_have_another_name(tmp_path: Path) -> None:
    """A bank of the one must not be searched with vectors of the other."""
    first = BertEmbedder(make_sentence_model(tmp_path / "model"))
    again = BertEmbedder(make_sentence_model(tmp_path / "model"))
    other = BertEmbedder(make_sentence_model(tmp_path / "model", seed=1))
    assert first.name == again.name
    assert first.name.startswith("model-")
    assert first.name != other.name


def _change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_a_folder_that_holds_no_such_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    """The operator reads it when the stack starts, not when the first vector is wrong."""
    folder = make_sentence_model(tmp_path / "model")
    good = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    cases: dict[str, Callable[[], object]] = {
        "config.json is missing": lambda: (folder / "config.json").unlink(),
        "holds no JSON object": lambda: (folder / "config.json").write_text("[]"),
        "cannot be read": lambda: (folder / "model.safetensors").write_bytes(b"\x08" + bytes(40)),
        "model.safetensors": lambda: (folder / "model.safetensors").unlink(),
        "tokenizer.json cannot be read": lambda: (folder / "tokenizer.json").write_text("{}"),
        "model_type is 'roberta'": lambda: _change(folder, model_type="roberta"),
        "hidden_act is 'relu'": lambda: _change(folder, hidden_act="relu"),
        "num_attention_heads is 'four'": lambda: _change(folder, num_attention_heads="four"),
        "not of the sizes in config.json": lambda: _change(folder, num_attention_heads=5),
        "holds no tensor 'encoder.layer.2": lambda: _change(folder, num_hidden_layers=3),
        "only the mean and the first token": lambda: (folder / "1_Pooling/config.json").write_text(
            '{"pooling_mode_mean_tokens": false, "pooling_mode_max_tokens": true}'
        ),
    }
    for reason, spoil in cases.items():
        for path, content in good.items():
            path.write_bytes(content)
        spoil()
        with pytest.raises(CheckpointError, match=reason.replace("(", r"\(")):
            BertEmbedder(folder)

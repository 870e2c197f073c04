"""Prompt Guard checkpoints: the network against transformers', and what is judged by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_stack_safety.classifier import MAX_WINDOWS, Classifier
from llama_stack_safety.deberta import Deberta, bucketed, gelu
from llama_stack_safety.prompt_guard import PromptGuard, PromptGuardConfig, PromptGuardParams
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from llama_stack.apis.common import Message
from llama_stack.errors import CheckpointError

pytestmark = pytest.mark.anyio

TOLERANCE = 2e-4
"""Of the logits, whose size is about one; both sides count in float32, in another order."""
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "ignore", "hello", *(f"w{n}" for n in range(58))]


def write(folder: Path, **changes: Any) -> DebertaV2ForSequenceClassification:
    """A random checkpoint in Prompt Guard's layout, and the network that wrote it."""
    settings: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "position_buckets": 8,
        "relative_attention": True,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
        "pooler_hidden_size": 48,
        "max_relative_positions": -1,
        "layer_norm_eps": 1e-7,
        "id2label": {0: "BENIGN", 1: "INJECTION", 2: "JAILBREAK"},
        "label2id": {"BENIGN": 0, "INJECTION": 1, "JAILBREAK": 2},
    }
    torch.manual_seed(0)
    network = DebertaV2ForSequenceClassification(DebertaV2Config(**settings | changes))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.train(False).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return network


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 33, 64])
@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 1, "position_buckets": 32}, {"num_attention_heads": 2}])
def test_the_network_computes_what_transformers_computes(length: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Short and long, so that near and far positions are both looked up."""
    theirs = write(tmp_path, **changes)
    ids = [(7 * n + 3) % len(WORDS) for n in range(length)]
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids])).logits[0].numpy()
    assert np.abs(Deberta.load(tmp_path).logits(ids) - expected).max() < TOLERANCE


def test_buckets_are_exact_when_near_and_grow_when_far() -> None:
    """Every distance within the context has a bucket of its own sign within the table."""
    buckets = bucketed(64, 8, 64)
    assert [int(b) for b in buckets[0, :5]] == [0, -1, -2, -3, -4]
    assert np.array_equal(buckets, -buckets.T)
    assert np.abs(buckets).max() < 8
    assert np.all(np.diff(buckets[:, 0]) >= 0)


def test_the_activation_is_the_exact_one_to_a_millionth() -> None:
    """The error function is approximated; the network must not notice."""
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    expected = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    assert np.abs(gelu(x) - expected).max() < 1e-6


def test_a_long_text_is_judged_in_windows_and_the_worst_one_counts(tmp_path: Path) -> None:
    """An attack at the end of a long text counts as it does alone."""
    write(tmp_path)
    classifier = Classifier(tmp_path)
    words = [f"w{n % 58}" for n in range(200)]
    starts = range(0, 200 - 31, 31)
    alone = [classifier.detect(" ".join(words[start : start + 62])).score for start in starts]
    assert classifier.detect(" ".join(words)).score == pytest.approx(max(alone), abs=1e-6)
    assert classifier.detect("").score == pytest.approx(classifier.detect("").score)
    with pytest.raises(ValueError, match=f"at most {MAX_WINDOWS} windows"):
        classifier.detect("w1 " * 2000)


def biased(folder: Path, towards: int) -> None:
    """Make a checkpoint say one label of everything."""
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"] = torch.zeros_like(weights["classifier.weight"])
    weights["classifier.bias"] = torch.tensor([8.0 if n == towards else 0.0 for n in range(3)])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("label", "objects"), [(0, False), (1, True), (2, True)])
async def test_the_guard_objects_by_the_checkpoint_s_labels(label: int, objects: bool, tmp_path: Path) -> None:
    """The first one is harmless; readiness says that a checkpoint is active."""
    write(tmp_path)
    biased(tmp_path, label)
    guard = PromptGuard(PromptGuardConfig(checkpoint=tmp_path))
    assert guard.details() == {"detector": f"checkpoint {tmp_path.name}"}
    violation = await guard.judge([Message.user("hello w1")], PromptGuardParams())
    assert (violation is not None) == objects
    if violation is not None:
        assert violation.details.endswith(("label INJECTION", "label JAILBREAK")[label - 1])
        assert await guard.judge([Message.user("hello w1")], PromptGuardParams(threshold=1.0)) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"pos_att_type": ["c2p"]}, "pos_att_type"),
        ({"conv_kernel_size": 3}, "conv_kernel_size 3"),
        ({"num_hidden_layers": 4}, "do not fit"),
        ({"id2label": {"0": "A"}}, "do not fit"),
        ({"num_attention_heads": "many"}, "lacks"),
    ],
)
def test_a_network_of_another_kind_is_refused(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    """Read as if it were of this kind, it would judge at random."""
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=told):
        Deberta.load(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff" * 100])
def test_a_folder_that_is_not_whole_is_refused(file: str, content: bytes | None, tmp_path: Path) -> None:
    """Missing, empty, cut, or junk: named, and no crash."""
    write(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=file):
        Classifier(tmp_path)

"""Rows as token ids: what bears the loss, and what lies beside what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from llama_stack_meta_reference.llama.chat_format import ChatFormat
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.llama.tokenizer import load_tokenizer
from llama_stack_meta_reference.training.samples import Encoder, PackedView, Rows, Sample, pack, portions, shown

from llama_stack.apis.common import Message
from llama_stack.errors import InvalidRequestError
from tests.providers.meta_reference import small_tokenizer
from tests.providers.meta_reference.training.jobs import message


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder(load_tokenizer(small_tokenizer.write_hugging_face(tmp_path_factory.mktemp("tokenizer"))), 128)


def test_only_what_the_assistant_writes_is_learnt_with_its_end(encoder: Encoder, tmp_path: Path) -> None:
    """A model that learns its user's words answers for them; one that does not learn the end never stops."""
    tokenizer = load_tokenizer(small_tokenizer.write_hugging_face(tmp_path))
    row = {
        "dialog": [
            message("system", "Be kind."),
            message("user", "Paris?"),
            message("assistant", "Yes."),
            message("user", "Oslo?"),
            message("assistant", "No."),
        ]
    }
    (sample,) = encoder.fine_tuning(row)
    pieces = shown(sample, tokenizer)
    assert [text for text, is_learnt in pieces if is_learnt] == ["Yes.<|eot_id|>", "No.<|eot_id|>"]
    whole = [Message.model_validate_json(json.dumps(m)) for m in row["dialog"]]
    prompt = ChatFormat(tokenizer).encode_dialog(whole[:-1])
    assert list(sample.tokens[: len(prompt)]) == prompt, "what is trained on is not what is served"


def test_of_a_text_all_but_its_start_is_learnt(encoder: Encoder) -> None:
    (sample,) = encoder.fine_tuning({"text": "the quick brown fox"})
    assert sample.learnt == (False,) + (True,) * (len(sample.tokens) - 1)


def test_a_preference_is_two_sequences_with_one_prompt(encoder: Encoder) -> None:
    row = {"prompt": [message("user", "Oslo?")], "chosen": [message("assistant", "Yes, it is.")],
           "rejected": [message("assistant", "No")]}  # fmt: skip
    chosen, rejected = encoder.preference(row)
    first = chosen.learnt.index(True)
    assert chosen.tokens[:first] == rejected.tokens[:first]
    assert not any(rejected.learnt[:first])
    assert all(rejected.learnt[first:])


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"dialog": [message("user", "Oslo?")]}, "no message of the assistant"),
        ({"dialog": []}, "no message of the assistant"),
        ({"dialog": "Oslo"}, "dialog: Input should be"),
        ({"dialog": [{"role": "pilot", "content": "x"}]}, "dialog.0.role"),
        ({"dialog": [message("assistant", "x")], "text": "x"}, "found: dialog, text"),
        ({"text": 3}, "found: text"),
        ({}, "found: none"),
    ],
)
def test_a_row_of_another_shape_is_refused_by_what_is_wrong(
    encoder: Encoder, row: dict[str, object], cause: str
) -> None:
    with pytest.raises(InvalidRequestError, match=cause):
        encoder.fine_tuning(row)


def test_rows_are_found_by_number_and_blank_lines_are_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \n{"a": "' + b"x" * 3_000_000 + b'"}\r\n{"a": 3}')
    rows = Rows(path)
    assert len(rows) == 3
    assert (rows[0], len(rows[1]["a"]), rows[2]) == ({"a": 1}, 3_000_000, {"a": 3})


@pytest.mark.parametrize("line", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_row_that_is_no_object_is_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(InvalidRequestError, match="JSON"):
        Rows(path)[0]


def test_sequences_side_by_side_do_not_see_each_other(small_model: Llama) -> None:
    """Each position's states must be those of the sequence alone; a leak makes a model read its neighbour's answer."""
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 256, (length,), generator=generator) for length in (5, 17, 17, 1)]
    for some in (sequences, sequences[1:3]):
        view = PackedView([len(tokens) for tokens in some], "cpu")
        together = small_model.hidden(torch.cat(some), view)
        alone = torch.cat([small_model.hidden(tokens[None])[0] for tokens in some])
        assert torch.allclose(together, alone, atol=1e-5)


def test_labels_stand_one_place_after_what_they_are_predicted_from() -> None:
    packed = pack([Sample((5, 6, 7), (False, True, True)), Sample((8, 9), (True, True))])
    assert packed.places_L.tolist() == [0, 1, 3]
    assert packed.labels_L.tolist() == [6, 7, 9], "a first token has nothing that it could be predicted from"
    assert packed.owners_L.tolist() == [0, 0, 1]
    assert packed.ends_B.tolist() == [2, 4]


def test_portions_are_bounded_and_tear_no_row_apart() -> None:
    groups = [(Sample((0,) * size, (True,) * size),) * 2 for size in (3, 4, 20, 1, 1)]
    made = list(portions(groups, [7, 8, 9, 10, 11], 14))
    assert [rows for _, rows in made] == [[7, 8], [9], [10, 11]]
    assert [len(samples) for samples, _ in made] == [4, 2, 4]

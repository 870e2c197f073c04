"""The two forms of tokenizer files, held against each other and against the libraries that read them."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_stack_meta_reference.llama.tokenizer import (
    SPLIT_PATTERN,
    SpecialToken,
    TextDecoder,
    Tokenizer,
    load_hugging_face,
    load_meta,
    load_tokenizer,
    special_token_names,
)

from llama_stack.errors import CheckpointError, InvalidRequestError
from tests.providers.meta_reference.small_tokenizer import write_hugging_face, write_meta

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\r\t'1aé😀<|>_")), max_size=60
) | st.sampled_from(["<|eot_id|>", "I'm 1234567 don't\r\n\r\n  x", "👩‍👩‍👧‍👦", "\x00\x1c\x85\u2028"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_hugging_face(folder)
    write_meta(folder)
    return folder


@pytest.fixture(scope="module")
def meta(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def hugging_face(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "tokenizer.json")


@UNTIMED
@given(text=TEXTS)
def test_both_forms_give_the_same_ids_and_give_the_text_back(
    meta: Tokenizer, hugging_face: Tokenizer, text: str
) -> None:
    """A checkpoint must not answer differently because it was downloaded in the other layout."""
    ids = meta.encode(text)
    assert hugging_face.encode(text) == ids
    assert meta.decode(ids) == hugging_face.decode(ids) == text


@UNTIMED
@given(text=TEXTS)
def test_ids_are_those_of_the_libraries_themselves(
    meta: Tokenizer, hugging_face: Tokenizer, folder: Path, text: str
) -> None:
    """Both loaders rebuild what they hand to the libraries; rebuilt and original must tokenize alike."""
    original = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    original.encode_special_tokens = True
    assert hugging_face.encode(text) == original.encode(text, add_special_tokens=False).ids
    lines = (folder / "tokenizer.model").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    plain = tiktoken.Encoding("plain", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert meta.encode(text) == plain.encode(text, disallowed_special=())


def test_special_tokens_have_their_published_ids() -> None:
    """The lists are Meta's; one name out of place and every prompt of a real checkpoint is wrong."""
    names = dict(enumerate(special_token_names(), start=128_000))
    assert len(names) == 256
    published = {
        128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128002: "<|reserved_special_token_0|>",
        128003: "<|reserved_special_token_1|>", 128004: "<|finetune_right_pad_id|>",
        128005: "<|reserved_special_token_2|>", 128006: "<|start_header_id|>", 128007: "<|end_header_id|>",
        128008: "<|eom_id|>", 128009: "<|eot_id|>", 128010: "<|python_tag|>", 128011: "<|reserved_special_token_3|>",
        128255: "<|reserved_special_token_247|>",
    }  # fmt: skip
    assert {token: names[token] for token in published} == published
    first = dict(enumerate(special_token_names("3.0"), start=128_000))
    assert len(first) == len(set(first.values())) == 256
    assert {token: first[token] for token in (128005, 128006, 128008, 128009, 128010, 128255)} == {
        128005: "<|reserved_special_token_3|>", 128006: "<|start_header_id|>", 128008: "<|reserved_special_token_4|>",
        128009: "<|eot_id|>", 128010: "<|reserved_special_token_5|>", 128255: "<|reserved_special_token_250|>",
    }  # fmt: skip


def test_text_is_never_read_as_a_special_token(meta: Tokenizer, hugging_face: Tokenizer) -> None:
    """A user who writes <|eot_id|> must not be able to end the turn and speak as somebody else."""
    for tokenizer in (meta, hugging_face):
        for name in tokenizer.specials:
            ids = tokenizer.encode(f"a{name}b {name}")
            assert not set(ids) & set(tokenizer.specials.values())
            assert tokenizer.decode(ids) == f"a{name}b {name}"


def test_special_tokens_are_known_by_name_and_id(meta: Tokenizer, hugging_face: Tokenizer) -> None:
    """The engine stops on ids, the tool-call parser reads names, and both must mean the same tokens."""
    assert meta.specials == hugging_face.specials
    assert meta.vocab_size == hugging_face.vocab_size == 1 + max(meta.specials.values())
    assert meta.stop_ids == {meta.specials[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")}
    tag = meta.special("<|python_tag|>")
    assert tag is not None
    assert meta.special_name(tag) == "<|python_tag|>"
    assert isinstance(meta.special_name(tag), SpecialToken)
    assert meta.special("<|no_such_token|>") is None
    assert meta.special_name(0) is None


def test_a_first_generation_folder_reads_under_its_own_names(folder: Path) -> None:
    """Llama 3.0 has neither <|eom_id|> nor <|python_tag|>; asking for them must say so."""
    tokenizer = load_meta(folder / "tokenizer.model", release="3.0")
    assert tokenizer.special("<|eom_id|>") is None
    assert tokenizer.special("<|python_tag|>") is None
    assert tokenizer.stop_ids == {tokenizer.specials["<|end_of_text|>"], tokenizer.specials["<|eot_id|>"]}


@UNTIMED
@given(data=st.data())
def test_streamed_text_equals_text_decoded_at_once(meta: Tokenizer, data: st.DataObject) -> None:
    """Any ids, broken characters, special tokens and ids of nothing included, give one text however they arrive."""
    ids = data.draw(st.lists(st.integers(0, meta.vocab_size + 3), max_size=40))
    decoder = TextDecoder(meta)
    streamed = "".join([*map(decoder.feed, ids), decoder.flush()])
    assert streamed == meta.decode(ids)
    runs: list[bytes] = [b""]
    for token in ids:
        if meta.special_name(token):
            runs.append(b"")
        else:
            runs[-1] += meta.token_bytes(token)
    assert streamed == "".join(run.decode("utf-8", "replace") for run in runs)


@UNTIMED
@given(text=TEXTS)
def test_streamed_pieces_are_whole_characters(hugging_face: Tokenizer, text: str) -> None:
    """A client shows each piece as it comes; half an emoji would be a replacement character that never goes away."""
    decoder = TextDecoder(hugging_face)
    shown = ""
    for token in hugging_face.encode(text):
        shown += decoder.feed(token)
        assert text.startswith(shown)
    assert shown == text
    assert decoder.flush() == ""


def test_a_character_left_incomplete_is_marked_at_the_end_only(meta: Tokenizer) -> None:
    """Generation may stop inside a character; the loss is visible, and appears no earlier than it is certain."""
    first, *_ = "😀".encode()
    token = next(token for token in range(meta.vocab_size) if meta.token_bytes(token) == bytes([first]))
    decoder = TextDecoder(meta)
    assert decoder.feed(token) == ""
    assert decoder.flush() == "�"
    assert decoder.flush() == ""
    assert [decoder.feed(token), decoder.feed(meta.specials["<|eot_id|>"])] == ["", "�"]


HOSTILE_TEXTS = {
    "letters": "a" * 130_000,
    "spaces": " " * 130_000,
    "marks": "!" * 60_000 + " " * 25_001 + "é" * 25_000,
    "runs just under the limit": ("a" * 24_999 + " ") * 20,
    "longer than a slice": "word " * 90_000,
    "a run across slices": "word " * 79_999 + "b" * 30_000,
}


@pytest.mark.parametrize("name", HOSTILE_TEXTS)
def test_no_run_reaches_the_libraries_that_they_cannot_take(name: str) -> None:
    """tiktoken panics above about a million letters and is slow before; the cuts keep every text within its means."""
    slices: list[str] = []

    def record(text: str) -> list[int]:
        slices.append(text)
        return []

    text = HOSTILE_TEXTS[name]
    Tokenizer(record, {0: b"a"}, {}).encode(text)
    assert "".join(slices) == text
    assert max(map(len, slices)) <= 400_000
    assert max(len(run) for part in slices for run in re.findall(r"\s+|\S+", part)) <= 25_000
    assert len(slices) <= 2 + len(text) // 25_000  # no more cuts than needed, for each may change the ids


def test_long_runs_are_cut_where_meta_cuts_them(meta: Tokenizer, hugging_face: Tokenizer) -> None:
    """The cuts show in the ids, so they are part of the format: 25,000 from the run's own start."""
    for tokenizer in (meta, hugging_face):
        whole = tokenizer.encode("x " + "a" * 60_000)
        parts = tokenizer.encode("x " + "a" * 25_000), tokenizer.encode("a" * 25_000), tokenizer.encode("a" * 10_000)
        assert whole == [*parts[0], *parts[1], *parts[2]]
    assert meta.encode(HOSTILE_TEXTS["marks"]) == hugging_face.encode(HOSTILE_TEXTS["marks"])


def test_a_lone_surrogate_is_refused_with_its_place(meta: Tokenizer, hugging_face: Tokenizer) -> None:
    """tiktoken would quietly replace it and tokenizers would raise TypeError; neither tells the caller what to do."""
    for tokenizer in (meta, hugging_face):
        with pytest.raises(InvalidRequestError, match=r"U\+DC80.*character 2"):
            tokenizer.encode("ab\udc80")


def test_added_tokens_are_special_whatever_the_file_calls_them(tmp_path: Path) -> None:
    """Trainers put special tokens into the vocabulary too, and mark some as not special; text must not reach either."""
    described = json.loads(write_hugging_face(tmp_path).read_text())
    vocabulary = described["model"]["vocab"]
    for added in described["added_tokens"]:
        vocabulary[added["content"]] = added["id"]
        added["special"] = False
    next(added for added in described["added_tokens"] if added["content"] == "<|eot_id|>")["content"] = "zebra"
    vocabulary["zebra"] = vocabulary.pop("<|eot_id|>")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(described))
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("zebra<|eom_id|>")
    assert not set(ids) & set(tokenizer.specials.values())
    assert tokenizer.decode(ids) == "zebra<|eom_id|>"


def _line(number: int, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        lines = text.splitlines()
        lines[number - 1] = new
        return "\n".join(lines)

    return change


BAD_META_FILES: dict[str, tuple[Callable[[str], str], str]] = {
    "not base64": (_line(7, "*** 6"), ":7: not a base64 token and its rank"),
    "no rank": (_line(7, "Jw=="), ":7: not a base64 token and its rank"),
    "rank is a word": (_line(7, "Jw== six"), ":7: not a base64 token and its rank"),
    "three columns": (_line(7, "Jw== 6 6"), ":7: not a base64 token and its rank"),
    "a rank left out": (_line(7, "Jw== 7"), ":7: rank 7 found where 6 is next"),
    "a token twice": (_line(7, "IQ== 6"), ":7: token b'!' is given twice"),
    "an empty token": (_line(7, "== 6"), ":7: "),
    "cut short": (lambda text: "\n".join(text.splitlines()[:100]), "156 of the 256 single bytes have no token"),
    "empty": (lambda text: "", "256 of the 256 single bytes have no token"),
    "a git-lfs pointer": (
        lambda text: "version https://git-lfs.github.com/spec/v1\nsize 2183982\n",
        ":1: not a base64",
    ),
}


@pytest.mark.parametrize("fault", BAD_META_FILES)
def test_a_bad_tokenizer_model_is_refused_with_its_line(tmp_path: Path, fault: str) -> None:
    """Downloads get cut and pointers get committed; the operator needs file, line and what is there."""
    change, message = BAD_META_FILES[fault]
    path = write_meta(tmp_path)
    path.write_text(change(path.read_text()))
    with pytest.raises(CheckpointError, match=re.escape(message)) as raised:
        load_meta(path)
    assert str(path) in raised.value.detail


BAD_JSON_FILES: dict[str, tuple[Callable[[str], str], str]] = {
    "cut short": (lambda text: text[:1000], "not JSON: "),
    "nested too deep": (lambda text: "[" * 100_000, "not JSON: "),
    "a list": (lambda text: "[]", "tokenizer.json: "),
    "no model": (lambda text: '{"added_tokens": []}', "'model' is missing"),
    "another kind": (lambda text: text.replace('"type": "BPE"', '"type": "Unigram"'), "'Unigram' tokenizer"),
    "SentencePiece-style": (lambda text: text.replace("ByteLevel", "Metaspace"), "byte-level BPE"),
    "two tokens with one id": (lambda text: text.replace('"!": 0', '"!": 1'), "share an id"),
    "a negative special id": (lambda text: re.sub(r'"id": \d+', '"id": -1', text, count=1), "-1"),
    "a merge of unknown tokens": (
        lambda text: re.sub(r'"merges": \[', '"merges": [["zq", "qz"],', text),
        "tokenizer.json: ",
    ),
}


@pytest.mark.parametrize("fault", BAD_JSON_FILES)
def test_a_bad_tokenizer_json_is_refused(tmp_path: Path, fault: str) -> None:
    """A folder from anywhere may hold anything; it is refused by file and fault, not by a library's stack trace."""
    change, message = BAD_JSON_FILES[fault]
    path = write_hugging_face(tmp_path)
    path.write_text(change(json.dumps(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=re.escape(message)) as raised:
        load_hugging_face(path)
    assert str(path) in raised.value.detail


def test_a_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    """Reading is bounded before it starts: a file of terabytes must not be read to find out that it is no tokenizer."""
    with pytest.raises(CheckpointError, match="No such file"):
        load_tokenizer(tmp_path / "tokenizer.model")
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="1099511627776 bytes"):
        load_tokenizer(path)

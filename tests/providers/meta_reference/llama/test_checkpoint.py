"""Model folders that are refused, and why. That good ones load right is test_parity.py's."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_stack_meta_reference.llama.checkpoint import load_model, open_checkpoint, save_hugging_face
from llama_stack_meta_reference.llama.model import Llama
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_stack.errors import CheckpointError
from tests.providers.meta_reference.checkpoints import random_reference, write_hugging_face, write_meta

LARGEST_GROWTH_BYTES = 64 << 20


@pytest.fixture(scope="module")
def meta_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(random_reference(), tmp_path_factory.mktemp("meta"), shards=2)


@pytest.fixture
def meta_checkpoint(meta_source: Path, tmp_path: Path) -> Path:
    """A folder of its own with two of Meta's shards."""
    return Path(shutil.copytree(meta_source, tmp_path / "meta"))


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    if path.suffix == ".pth":
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


def write_safetensors(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def test_opening_tells_everything_but_the_values(small_checkpoint: Path, small_model: Llama) -> None:
    """An engine decides by this about memory and when to stop, before it loads."""
    (small_checkpoint / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(small_checkpoint)
    assert (checkpoint.layout, checkpoint.config, checkpoint.dtype) == (
        "hugging_face",
        small_model.config,
        torch.float32,
    )
    assert (checkpoint.eos_ids, checkpoint.remarks) == ((3, 5), ())
    assert checkpoint.tokenizer == small_checkpoint / "tokenizer.json"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_weights_come_back(small_model: Llama, tmp_path: Path, dtype: torch.dtype) -> None:
    """Training hands its result to inference through these files; rounding to ``dtype`` is the only loss."""
    save_hugging_face(small_model, tmp_path / "saved", dtype=dtype)
    checkpoint = open_checkpoint(tmp_path / "saved")
    assert checkpoint.dtype == dtype
    loaded = load_model(checkpoint, device="cpu", dtype=torch.float32)
    for (name, weight), (loaded_name, loaded_weight) in zip(
        small_model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == loaded_name
        assert torch.equal(weight.to(dtype).float(), loaded_weight)


def test_a_loaded_network_does_not_need_its_files(small_checkpoint: Path, small_model: Llama) -> None:
    """A mapped file that is cut short kills the process with SIGBUS at the next forward pass."""
    model = load_model(open_checkpoint(small_checkpoint), device="cpu", dtype=torch.float32)
    os.truncate(small_checkpoint / "model.safetensors", 0)
    tokens_BT = torch.arange(5)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens_BT), small_model(tokens_BT))


def test_a_save_that_was_cut_off_leaves_a_folder_that_is_refused(small_checkpoint: Path, small_model: Llama) -> None:
    """New weights under an old config would load, and be wrong."""
    (small_checkpoint / "model.safetensors.part").mkdir()  # the save fails where it writes the weights
    with pytest.raises(Exception, match="directory"):
        save_hugging_face(small_model, small_checkpoint)
    with pytest.raises(CheckpointError, match=r"no config\.json; found: model\.safetensors"):
        open_checkpoint(small_checkpoint)


def test_a_save_leaves_nothing_of_the_one_before(small_checkpoint: Path, small_model: Llama) -> None:
    """Old shards would be read for the new ones, and ids that ended the old model's turns may be words now."""
    write_hugging_face(random_reference(), small_checkpoint, shard_bytes=100_000)
    save_hugging_face(small_model, small_checkpoint)
    checkpoint = open_checkpoint(small_checkpoint)
    assert (checkpoint.eos_ids, checkpoint.config) == ((), small_model.config)
    assert checkpoint.weight_files == (small_checkpoint / "model.safetensors",)


def test_a_folder_without_tokenizer_says_so_when_asked(small_checkpoint: Path) -> None:
    """Scoring raw ids needs none; serving text does, and learns it here."""
    with pytest.raises(CheckpointError, match=r"no tokenizer: neither tokenizer\.json nor tokenizer\.model"):
        _ = open_checkpoint(small_checkpoint).tokenizer


def test_what_the_system_refuses_to_read_is_named(tmp_path: Path) -> None:
    """A name that is too long, no permission, a broken disk: the operator's problem, not an unknown error."""
    with pytest.raises(CheckpointError, match=r"cannot be read: File name too long"):
        open_checkpoint(tmp_path / ("x" * 300))


def test_hugging_face_is_chosen_over_meta_and_said(meta_checkpoint: Path) -> None:
    """Published folders carry both: the choice must not be a surprise."""
    write_hugging_face(random_reference(), meta_checkpoint)
    checkpoint = open_checkpoint(meta_checkpoint)
    assert checkpoint.layout == "hugging_face"
    assert checkpoint.remarks == (f"{meta_checkpoint} also has Meta's layout; read Hugging Face's",)


def test_meta_weights_in_original_are_found(meta_checkpoint: Path, tmp_path: Path) -> None:
    """Meta's files come in a subfolder of the repository that people download."""
    outer = tmp_path / "repository"
    shutil.copytree(meta_checkpoint, outer / "original")
    (outer / "original" / "tokenizer.model").write_text("")
    checkpoint = open_checkpoint(outer)
    assert (checkpoint.layout, checkpoint.folder) == ("meta", outer / "original")
    assert checkpoint.tokenizer == outer / "original" / "tokenizer.model"
    assert checkpoint.remarks == (f"read from {outer / 'original'}",)


def test_links_of_a_hub_cache_are_followed(small_checkpoint: Path, tmp_path: Path) -> None:
    """Hugging Face's cache keeps every file as a link from snapshots/REVISION to blobs, outside of that folder."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0123", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(small_checkpoint.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert open_checkpoint(snapshot).eos_ids == (3, 5)


def make_missing(folder: Path) -> None:
    shutil.rmtree(folder)


def make_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def make_empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def keep_only_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def link_weights_outside(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.rename(folder.parent / "elsewhere")
    weights.symlink_to(folder.parent / "elsewhere")


def make_weights_a_pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def make_weights_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def make_link_loop(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to("config.json")
    (folder / "config.json").symlink_to("generation_config.json")


def index_to(target: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": target}}))

    return make


def index_of(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder / "model.safetensors", change)


def add_second_file_with_a_double(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
    weight_map = {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_missing, r"no such folder"),
        (make_a_file, r"not a folder"),
        (make_empty, r"no model: config\.json with model\.safetensors, or params\.json with .*; found: nothing"),
        (keep_only_pickled_weights, r"neither model\.safetensors nor .*; found: config\.json, .*pytorch_model\.bin"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json; found: generation_config\.json, "),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: not JSON: "),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json: must hold a JSON object"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), r"config\.json: not JSON: "),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), r"config\.json: not JSON: "),
        (
            lambda folder: (folder / "config.json").write_text(" " * 2_000_001),
            r"2000001 bytes; at most 2000000 are read",
        ),
        (lambda folder: change_json(folder / "config.json", hidden_size=128), r"has shape .*; config\.json needs"),
        (
            lambda folder: change_json(folder / "generation_config.json", eos_token_id="x"),
            r"eos_token_id must be a token",
        ),
        (link_weights_outside, r"model\.safetensors: a link that leaves the folder$"),
        (make_weights_a_pipe, r"model\.safetensors: not a regular file"),
        (make_weights_a_folder, r"model\.safetensors: not a regular file"),
        (make_link_loop, r"no config\.json|cannot be read"),
        (index_to("../elsewhere.safetensors"), r"'\.\./elsewhere\.safetensors' is not the plain name"),
        (index_to("/etc/passwd"), r"'/etc/passwd' is not the plain name"),
        (index_to("pytorch_model.bin"), r"is not the plain name of a \.safetensors file"),
        (index_to(""), r"is not the plain name"),
        (index_to("gone.safetensors"), r"gone\.safetensors: cannot be read: No such file"),
        (index_of("{}"), r"weight_map must map tensor names to file names"),
        (index_of('{"weight_map": {"a": 1}}'), r"is not the plain name"),
        (add_second_file_with_a_double, r"b\.safetensors: .* stands in a\.safetensors too"),
        (tensors(lambda found: found.pop("model.norm.weight")), r"missing: model\.norm\.weight"),
        (tensors(lambda found: found.pop("lm_head.weight")), r"missing: lm_head\.weight"),
        (
            tensors(lambda found: found.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})),
            r"unexpected: model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        (
            tensors(lambda found: found.update({"model.norm.weight": torch.zeros(63)})),
            r"model\.norm\.weight has shape \[63\]; config\.json needs \[64\]",
        ),
        (
            tensors(lambda found: found.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)})),
            r"model\.norm\.weight is torch\.int8; weights must be floating-point",
        ),
    ],
)
def test_bad_hugging_face_folders_are_refused(
    make: Callable[[Path], object], message: str, small_checkpoint: Path
) -> None:
    """Each with what was found, what is missing and where: the operator's next step is in the message."""
    make(small_checkpoint)
    with pytest.raises(CheckpointError, match=message) as refusal:
        open_checkpoint(small_checkpoint)
    assert str(small_checkpoint) in str(refusal.value)


def shard(number: int, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder / f"consolidated.{number:02}.pth", change)


def compress_shard(folder: Path) -> None:
    path = folder / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def store(value: object) -> Callable[[Path], None]:
    return lambda folder: torch.save(value, folder / "consolidated.00.pth")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "params.json").unlink(), r"has consolidated shards, but no params\.json"),
        (
            lambda folder: [file.unlink() for file in folder.glob("*.pth")],
            r"params\.json is there, but no consolidated",
        ),
        (
            lambda folder: (folder / "consolidated.00.pth").unlink(),
            r"shards are missing: consolidated\.00\.pth; found: consolidated\.01\.pth",
        ),
        (lambda folder: (folder / "consolidated.01.pth").unlink(), r"has shape .*; its part of .* is"),
        (
            lambda folder: shutil.copy(folder / "consolidated.01.pth", folder / "consolidated.02.pth"),
            r"3 shards do not divide",
        ),
        (lambda folder: (folder / "consolidated.pth").write_bytes(b""), r"which shards belong together cannot be told"),
        (shard(1, lambda found: found.pop("norm.weight")), r"01\.pth: its tensors differ .*: norm\.weight"),
        (
            shard(1, lambda found: found.update({"norm.weight": torch.zeros(3)})),
            r"01\.pth: norm\.weight has shape \[3\]",
        ),
        (
            shard(0, lambda found: found.update({"norm.weight": torch.zeros(64).to_sparse()})),
            r"asks for 'torch\._utils\._rebuild_sparse_tensor'",
        ),
        (shard(0, lambda found: found.update({"norm.weight": torch.zeros(64).int()})), r"not a plain floating-point"),
        (shard(0, lambda found: found.update({"tok_embeddings.weight": torch.tensor(1.0)})), r"has shape \[\]"),
        (compress_shard, r"archive member .* is compressed"),
        (store([torch.zeros(1)]), r"must hold a dictionary of tensors; found list"),
        (store({}), r"must hold a dictionary of tensors"),
        (store({"a": 1}), r"'a' is not a plain floating-point tensor"),
        (store({1: torch.zeros(1)}), r"1 is not a plain floating-point tensor"),
        (lambda folder: change_json(folder / "params.json", vision_chunk_size=448), r"unsupported: vision_chunk_size"),
    ],
)
def test_bad_meta_folders_are_refused(make: Callable[[Path], object], message: str, meta_checkpoint: Path) -> None:
    """As for the other layout: named, and before memory is taken."""
    make(meta_checkpoint)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(meta_checkpoint)


def test_a_rope_factor_that_the_folder_does_not_state_is_told(meta_checkpoint: Path) -> None:
    """It is known from the sizes of the published models alone, and a wrong one only shows in long texts."""
    change_json(meta_checkpoint / "params.json", use_scaled_rope=True)
    (remark,) = open_checkpoint(meta_checkpoint).remarks
    assert "no rope_scaling_factor: took 8," in remark
    change_json(meta_checkpoint / "params.json", rope_scaling_factor=4)
    assert open_checkpoint(meta_checkpoint).remarks == ()


def test_shards_of_two_models_are_refused(meta_checkpoint: Path) -> None:
    """Same shapes, other weights: only what every rank repeats can show that two downloads were mixed."""
    change_tensors(meta_checkpoint / "consolidated.01.pth", lambda found: found["norm.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"norm\.weight differs between shards: they are of different models"):
        load_model(open_checkpoint(meta_checkpoint), device="cpu", dtype=torch.float32)


def test_ranks_may_store_what_they_repeat_in_different_types(meta_checkpoint: Path) -> None:
    """Only the numbers tell whether two shards are of one model."""
    change_tensors(
        meta_checkpoint / "consolidated.01.pth",
        lambda found: found.update({"norm.weight": found["norm.weight"].double()}),
    )
    load_model(open_checkpoint(meta_checkpoint), device="cpu", dtype=torch.float32)


def test_old_torch_reads_no_pickles(meta_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.10, weights_only could be led to run code or to write out of bounds."""
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(CheckpointError, match=r"only with torch 2\.10 or newer; found 2\.9\.1"):
        open_checkpoint(meta_checkpoint)


@pytest.mark.parametrize(("layout", "name"), [("hugging face", "model.norm.weight"), ("meta", "norm.weight")])
@pytest.mark.parametrize(
    ("value", "dtype"), [("nan", "float32"), ("inf", "bfloat16"), ("-inf", "float32"), ("1e6", "float16")]
)
def test_weights_that_are_not_finite_are_refused_by_name(
    layout: str, name: str, value: str, dtype: str, small_checkpoint: Path, meta_checkpoint: Path
) -> None:
    """One of them turns every answer into noise or an error, long after the start and without its cause."""
    files = {"meta": sorted(meta_checkpoint.glob("*.pth"))}.get(layout, [small_checkpoint / "model.safetensors"])
    for file in files:
        change_tensors(file, lambda found: found[name][5].fill_(float(value)))
    checkpoint = open_checkpoint(files[0].parent)
    with pytest.raises(CheckpointError, match=rf": {name} holds NaN or infinity, or numbers too large for {dtype}"):
        load_model(checkpoint, device="cpu", dtype=getattr(torch, dtype))


def span(start: int, end: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data_bytes", "length", "message"),
    [
        ({}, 0, 1 << 62, r"cut short: .* the header alone takes"),
        ({}, 0, 3, r"cut short: 10 bytes|header is not JSON|cut short"),
        (b" " * 2_000_001, 0, None, r"a header of 2000001 bytes; at most 2000000 are read"),
        (b"[]", 0, None, r"not a JSON object"),
        (b"{'a': 1}", 0, None, r"the header is not JSON"),
        (b'{"a":' * 100_000, 0, None, r"the header is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", 0, None, r"the header is not JSON"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', 0, None, r"a key stands twice"),
        (b"\xff\xff", 0, None, r"the header is not JSON"),
        ({"__metadata__": 5}, 0, None, r"__metadata__ in the header must map"),
        ({"__metadata__": {"format": ["pt"]}}, 0, None, r"__metadata__ in the header must map"),
        ({"a": 1}, 0, None, r"must give dtype, shape and data_offsets"),
        ({"a": span(0, 4) | {"more": 1}}, 4, None, r"must give dtype, shape and data_offsets"),
        ({"a": span(0, 4, dtype="F8_E5M2")}, 4, None, r"unknown dtype 'F8_E5M2'"),
        ({"a": span(0, 4, dtype=["F32"])}, 4, None, r"unknown dtype"),
        ({"a": span(0, 4, shape=[-1])}, 4, None, r"shape must be up to 8 whole numbers"),
        ({"a": span(0, 4, shape=[True])}, 4, None, r"shape must be up to 8 whole numbers"),
        ({"a": span(0, 4, shape=[1.0])}, 4, None, r"shape must be up to 8 whole numbers"),
        ({"a": span(0, 4, shape=[1 << 60])}, 4, None, r"shape must be up to 8 whole numbers"),
        ({"a": span(0, 4, shape=[1] * 9)}, 4, None, r"shape must be up to 8 whole numbers"),
        ({"a": span(0, 4, shape=[1 << 40, 1 << 40])}, 4, None, r"take 4835703278458516698824704 bytes"),
        ({"a": span(4, 0)}, 4, None, r"two whole numbers in order"),
        ({"a": span(-4, 0)}, 4, None, r"two whole numbers in order"),
        ({"a": span(0, 1 << 40)}, 4, None, r"take 4 bytes, but its span has 1099511627776"),
        ({"a": span(0, 1 << 40, shape=[1 << 38])}, 4, None, r"cut short or damaged"),
        ({"a": span(4, 8)}, 8, None, r"starts at byte 4 of the data; the one before ends at 0"),
        ({"a": span(0, 4), "b": span(0, 4)}, 4, None, r"starts at byte 0 of the data; the one before ends at 4"),
        ({"a": span(0, 8, shape=[2]), "b": span(4, 8)}, 8, None, r"starts at byte 4 of the data"),
        ({"a": span(0, 4)}, 3, None, r"cut short or damaged"),
        ({"a": span(0, 4)}, 5, None, r"cut short or damaged"),
    ],
)
def test_lies_in_a_header_are_refused(
    header: Any, data_bytes: int, length: int | None, message: str, small_checkpoint: Path
) -> None:
    """A size that is believed is read, and what lies beyond a file's end is another program's memory or a crash."""
    write_safetensors(small_checkpoint / "model.safetensors", header, b"\0" * data_bytes, length=length)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(small_checkpoint)


@pytest.fixture(params=["model.safetensors", "consolidated.00.pth"])
def weight_file(request: pytest.FixtureRequest, small_checkpoint: Path, meta_checkpoint: Path) -> Path:
    """One file of a good folder of either layout."""
    folder = small_checkpoint if request.param == "model.safetensors" else meta_checkpoint
    return folder / str(request.param)


def test_files_cut_short_anywhere_are_refused(weight_file: Path) -> None:
    """A download that broke off: 100 lengths, the ends among them."""
    whole = weight_file.read_bytes()
    chosen = random.Random(0)
    for length in [0, 1, 7, 8, 9, len(whole) - 1, *(chosen.randrange(len(whole)) for _ in range(94))]:
        weight_file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=weight_file.name):
            open_checkpoint(weight_file.parent)


def test_flipped_bits_in_the_description_never_crash(weight_file: Path) -> None:
    """200 flips where names, shapes and sizes stand: refused, or the network is of the same sizes."""
    whole = weight_file.read_bytes()
    described = range(8 + int.from_bytes(whole[:8], "little"))
    if weight_file.suffix == ".pth":
        with zipfile.ZipFile(weight_file) as archive:
            member = next(member for member in archive.infolist() if member.filename.endswith("data.pkl"))
        described = range(member.header_offset, member.header_offset + member.file_size)
    expected = open_checkpoint(weight_file.parent).config
    chosen = random.Random(0)
    refused = 0
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[chosen.choice(described)] ^= 1 << chosen.randrange(8)
        weight_file.write_bytes(flipped)
        try:
            assert open_checkpoint(weight_file.parent).config == expected
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_refusing_takes_little_memory(small_checkpoint: Path) -> None:
    """The largest header that is parsed, all of it nested lists: a server that reads one must not lose its memory."""
    write_safetensors(small_checkpoint / "model.safetensors", b'{"a":[' + b"[]," * 660_000 + b"[]]}")
    script = f"""
import resource, sys
from pathlib import Path
from llama_stack.errors import CheckpointError
from llama_stack_meta_reference.llama.checkpoint import open_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_checkpoint(Path({str(small_checkpoint)!r}))
except CheckpointError:
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert int(child.stdout) <= LARGEST_GROWTH_BYTES

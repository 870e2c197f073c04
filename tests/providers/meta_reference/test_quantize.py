"""A folder that was rounded once is the model that rounding at the start would give."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from llama_stack_meta_reference.config import ModelConfig
from llama_stack_meta_reference.inference.batch import Batch
from llama_stack_meta_reference.inference.loading import OpenModel, open_model
from llama_stack_meta_reference.inference.native_runner import NativeStorage
from llama_stack_meta_reference.inference.runner import TorchStorage
from llama_stack_meta_reference.llama.checkpoint import load_model, open_checkpoint, save_hugging_face
from llama_stack_meta_reference.llama.quantize import KINDS
from llama_stack_meta_reference.quantize import quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_stack.errors import CheckpointError, SetupError
from tests.providers.meta_reference.checkpoints import random_reference, write_meta
from tests.providers.meta_reference.kernels import NEEDS_KERNELS

Kind = Literal["int8", "int4", "float8"]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rounded_folder_is_what_rounding_at_the_start_gives(
    worded_checkpoint: Path, tmp_path: Path, kind: Kind
) -> None:
    """To the last bit, with the tokenizer and the ids that end a turn, in a fraction of the room."""
    target = tmp_path / "deep" / "rounded"
    quantize(worded_checkpoint, target, kind)
    assert files(target.parent) == {"rounded"}
    assert files(target) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    source, rounded = open_checkpoint(worded_checkpoint), open_checkpoint(target)
    assert (rounded.rounding, rounded.config, rounded.eos_ids) == (kind, source.config, source.eos_ids)
    expected = load_model(source, device="cpu", dtype=torch.float32, rounding=kind).state_dict()
    found = load_model(rounded, device="cpu", dtype=torch.float32, rounding=kind).state_dict()
    assert found.keys() == expected.keys()
    for name, kept in found.items():
        assert kept.dtype is expected[name].dtype
        assert torch.equal(kept.view(torch.uint8), expected[name].view(torch.uint8)), name
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (target, worded_checkpoint)]
    assert sizes[0] < 0.65 * sizes[1]


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(worded_checkpoint: Path, tmp_path: Path) -> None:
    """An operator sees the cause, not a traceback. A limit on the size of files stands for the disk's end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(SetupError, match="rounded cannot be written: .*too large"):
            quantize(worded_checkpoint, tmp_path / "rounded", "int8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "rounded" not in files(tmp_path)
    assert "rounded.part" not in files(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_auto_takes_the_type_of_the_folder(worded_checkpoint: Path, tmp_path: Path, kind: Kind) -> None:
    """And any other that is asked for, since rounded weights are numbers like others."""
    quantize(worded_checkpoint, tmp_path / "rounded", kind)
    opened, as_auto = opened_and_logits(tmp_path / "rounded", kernels="plain")
    assert opened.storage == TorchStorage(torch.float32, kind)
    opened, as_floats = opened_and_logits(tmp_path / "rounded", kernels="plain", dtype="float32")
    assert opened.storage == TorchStorage(torch.float32)
    # The same weights; float8 rounds the activations as well.
    assert (as_auto - as_floats).norm() / as_floats.norm() < (0.1 if kind == "float8" else 1e-5)


def opened_and_logits(folder: Path, **settings: str) -> tuple[OpenModel, Tensor]:
    opened = open_model("m", ModelConfig.model_validate({"checkpoint": str(folder), "device": "cpu"} | settings))
    executor = opened.load(856)
    logits_RV = executor._runner.run(Batch([5, 9, 700], [0], [3], [[0]], [2])).clone()
    executor.close()
    return opened, logits_RV


@NEEDS_KERNELS
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_compiled_kernels_read_a_rounded_folder(worded_checkpoint: Path, tmp_path: Path, kind: Kind) -> None:
    """A CPU runs it as it runs any other, and packs what the rounded weights stand for."""
    quantize(worded_checkpoint, tmp_path / "rounded", kind)
    opened, found = opened_and_logits(tmp_path / "rounded")
    assert isinstance(opened.storage, NativeStorage)
    assert opened.storage.kind == kind
    _, expected = opened_and_logits(worded_checkpoint, dtype=kind)
    assert (found - expected).norm() / expected.norm() < 0.03


def test_a_tied_output_is_stored_once(tmp_path: Path) -> None:
    """It is a copy of the embeddings, and is rounded from them again."""
    reference = random_reference(tied=True)
    write_meta(reference, tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "rounded", "int8")
    names = load_file(tmp_path / "rounded" / "model.safetensors").keys()
    assert not [name for name in names if "lm_head" in name]
    expected, found = (
        load_model(open_checkpoint(tmp_path / name), device="cpu", dtype=torch.float32, rounding="int8")
        for name in ("source", "rounded")
    )
    tokens_BT = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(found(tokens_BT), expected(tokens_BT))


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


WQ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{WQ}.scale"), rf"{WQ}\.scale is missing"),
        (without(f"{WQ}.weight"), rf"missing: {WQ}\.weight"),
        (lambda t: t | {f"{WQ}.scale": t[f"{WQ}.scale"][:-1].clone()}, r"scale has shape \[63, 1\].*needs \[64, 1\]"),
        (
            lambda t: t | {f"{WQ}.weight": t[f"{WQ}.weight"].float()},
            r"is torch\.float32; config\.json needs torch\.int8",
        ),
        (
            lambda t: t | {"model.norm.weight": t["model.norm.weight"].to(torch.int8)},
            r"model\.norm\.weight is torch\.int8",
        ),
        (lambda t: t | {"model.norm.scale": torch.ones(1)}, r"unexpected: model\.norm\.scale"),
    ],
    ids=["no scale", "no weight", "short scale", "floats", "rounded norm", "one too many"],
)
def test_a_damaged_folder_is_refused_by_the_name_of_what_is_wrong(
    worded_checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    """Before memory is taken; one scale less would shift all numbers after it."""
    folder = tmp_path / "rounded"
    quantize(worded_checkpoint, folder, "int8")
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_scale_that_is_no_number_is_refused_when_it_is_read(worded_checkpoint: Path, tmp_path: Path) -> None:
    """Every answer would be noise."""
    folder = tmp_path / "rounded"
    quantize(worded_checkpoint, folder, "float8")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{WQ}.scale"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    for rounding in ("float8", None):
        with pytest.raises(CheckpointError, match=rf"{WQ}\.weight holds NaN or infinity"):
            load_model(open_checkpoint(folder), device="cpu", dtype=torch.float32, rounding=rounding)


@pytest.mark.parametrize(
    "described",
    [
        {"quant_method": "llama-stack", "dtype": "int3"},
        {"quant_method": "llama-stack"},
        {"quant_method": "gptq"},
        "int8",
    ],
)
def test_a_type_that_is_not_ours_is_refused(worded_checkpoint: Path, tmp_path: Path, described: object) -> None:
    """Another tool's weights under our names would load, and be wrong."""
    folder = tmp_path / "rounded"
    quantize(worded_checkpoint, folder, "int8")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": described}))
    with pytest.raises(CheckpointError, match="unsupported quantization_config"):
        open_checkpoint(folder)


def test_float8_weights_without_scales_are_no_model(worded_checkpoint: Path) -> None:
    """Others publish such files, and each means something else by them."""
    file = worded_checkpoint / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {f"{WQ}.weight": tensors[f"{WQ}.weight"].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(CheckpointError, match="is torch.float8_e4m3fn; weights must be floating-point"):
        open_checkpoint(worded_checkpoint)


def test_what_cannot_be_done_leaves_nothing_behind(worded_checkpoint: Path, tmp_path: Path) -> None:
    """A folder that is there is not touched, and half of one is never found under the name of a whole."""
    (tmp_path / "taken").mkdir()
    with pytest.raises(SetupError, match="taken is there already; remove it"):
        quantize(worded_checkpoint, tmp_path / "taken", "int8")
    (tmp_path / "new.part").mkdir()
    with pytest.raises(SetupError, match=r"new\.part cannot be made: File exists; remove what is left of it"):
        quantize(worded_checkpoint, tmp_path / "new", "int8")
    (tmp_path / "new.part").rmdir()
    quantize(worded_checkpoint, tmp_path / "new", "int8")
    with pytest.raises(CheckpointError, match="is int8 already"):
        quantize(tmp_path / "new", tmp_path / "again", "int4")
    broken = load_model(open_checkpoint(worded_checkpoint), device="cpu", dtype=torch.float32)
    broken.norm.weight.data[0] = torch.nan
    save_hugging_face(broken, tmp_path / "broken")
    with pytest.raises(CheckpointError, match="holds NaN"):
        quantize(tmp_path / "broken", tmp_path / "again", "int8")
    assert files(tmp_path) == {"taken", "new", "broken", "worded"}


def test_the_command_says_what_is_wrong_in_one_line(worded_checkpoint: Path, tmp_path: Path) -> None:
    """As every command does."""
    call = [sys.executable, "-m", "llama_stack_meta_reference.quantize"]
    done = subprocess.run(
        [*call, worded_checkpoint, tmp_path / "rounded", "--dtype", "int4"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert open_checkpoint(tmp_path / "rounded").rounding == "int4"
    done = subprocess.run(
        [*call, tmp_path / "none", tmp_path / "again", "--dtype", "int4"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'none'}: no such folder\n"

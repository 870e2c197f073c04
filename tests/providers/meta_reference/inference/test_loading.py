"""From a model's configuration to what executes it: what is settled, what is said, what is refused."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from llama_stack_meta_reference.config import ModelConfig
from llama_stack_meta_reference.inference import loading, measuring
from llama_stack_meta_reference.inference.batch import Batch
from llama_stack_meta_reference.inference.loading import open_model
from llama_stack_meta_reference.inference.native_runner import NativeStorage
from llama_stack_meta_reference.inference.runner import TorchStorage
from llama_stack_meta_reference.inference.sampler import Choice
from llama_stack_meta_reference.llama.checkpoint import load_model, save_hugging_face
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.llama.quantize import KINDS
from llama_stack_meta_reference.native.library import KernelsUnavailableError

from llama_stack.errors import CheckpointError, SetupError
from tests.providers.meta_reference import small_tokenizer
from tests.providers.meta_reference.kernels import NEEDS_KERNELS
from tests.providers.meta_reference.small_llama import WORDED

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")


@NEEDS_KERNELS
def test_the_plan_is_shown_before_weights_are_read(worded_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Memory is no surprise: device, type, plan and then the time to ready, in this order."""
    caplog.set_level(logging.INFO)
    model = open_model("m", ModelConfig(checkpoint=str(worded_checkpoint), device="cpu", max_sequences=3))
    model.load(WORDED.vocab_size).close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("model 'm': float32, cpu: weights ")
    assert "(384 tokens of 512 B)" in lines[0]
    assert lines[1].startswith("model 'm': ready on cpu, weights and cache in ")
    assert model.plan.context == 128
    assert model.plan.weight_bytes == WORDED.parameter_count * 4


def test_loading_leaves_torchs_compiler_alone(worded_checkpoint: Path) -> None:
    """Some of torch's functions import it on the device "meta": one to three seconds of every start, for nothing."""
    code = (
        "import sys; from llama_stack_meta_reference.inference.loading import open_model, ModelConfig;"
        f"open_model('m', ModelConfig(checkpoint={str(worded_checkpoint)!r}, device='cpu')).load(856);"
        "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@NO_GPU
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_an_error_and_never_the_cpu(worded_checkpoint: Path, device: str) -> None:
    """The most common confusion of our peers' users: a silent fall to the CPU."""
    with pytest.raises(SetupError, match=f"asks for device '{device}'.*set device: cpu or auto"):
        open_model("m", ModelConfig(checkpoint=str(worded_checkpoint), device=device))


@NO_GPU
def test_auto_says_that_it_took_the_cpu(worded_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who asked for nothing is told what was chosen and why."""
    caplog.set_level(logging.INFO)
    model = open_model("m", ModelConfig(checkpoint=str(worded_checkpoint)))
    assert model.device.type == "cpu"
    assert "device auto is the CPU" in caplog.text
    assert model.storage.name == "float32"


@GPU
def test_a_gpu_is_used_where_there_is_one(worded_checkpoint: Path) -> None:
    """``auto`` and ``cuda`` are the first GPU, in bfloat16; one beyond the last is refused."""
    for device in ("auto", "cuda"):
        model = open_model("m", ModelConfig(checkpoint=str(worded_checkpoint), device=device))
        assert str(model.device) == "cuda:0"
        assert model.storage == TorchStorage(torch.bfloat16)
        assert (model.plan.block_tokens, model.static_rows) == (256, 32)
    with pytest.raises(SetupError, match="this machine has"):
        open_model("m", ModelConfig(checkpoint=str(worded_checkpoint), device="cuda:99"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_that_is_asked_for_is_used(worded_checkpoint: Path, dtype: str) -> None:
    """On the CPU too, though float32 is faster there."""
    config = ModelConfig.model_validate(
        {"checkpoint": str(worded_checkpoint), "device": "cpu", "dtype": dtype, "kernels": "plain"}
    )
    model = open_model("m", config)
    assert model.storage == TorchStorage(getattr(torch, dtype))
    assert model.plan.weight_bytes == WORDED.parameter_count * getattr(torch, dtype).itemsize


@NEEDS_KERNELS
@pytest.mark.parametrize(("stored", "kind"), [(torch.float32, "float32"), (torch.bfloat16, "float16")])
def test_a_cpu_packs_a_checkpoint_as_what_it_was_stored_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, kind: str
) -> None:
    """What a 16-bit checkpoint holds, float16 holds too, in half the memory that every token must read."""
    monkeypatch.setattr(loading, "fastest_type", lambda half, whole, *, compiled: (half, "measured"))
    model = Llama(WORDED, device="cpu", dtype=stored)
    model.initialize()
    save_hugging_face(model, tmp_path, eos_ids=[7])
    small_tokenizer.write_hugging_face(tmp_path)
    loaded = open_model("m", ModelConfig(checkpoint=str(tmp_path), device="cpu"))
    assert loaded.storage == NativeStorage(kind, stored)


@pytest.mark.parametrize("kernels", ["plain", pytest.param("compiled", marks=NEEDS_KERNELS)])
@pytest.mark.parametrize("is_half_slow", [True, False])
def test_a_cpu_that_is_slow_in_sixteen_bits_takes_float32_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kernels: str, is_half_slow: bool
) -> None:
    """By measuring: the names of types and processors do not tell."""
    caplog.set_level(logging.INFO)
    model = Llama(WORDED, device="cpu", dtype=torch.bfloat16)
    model.initialize()
    save_hugging_face(model, tmp_path)
    small_tokenizer.write_hugging_face(tmp_path)
    half = "float16" if kernels == "compiled" else "bfloat16"
    monkeypatch.setattr(measuring, "measure", lambda works: {half: 0.1 if is_half_slow else 0.001, "float32": 0.001})
    measuring.fastest_type.cache_clear()
    config = ModelConfig.model_validate({"checkpoint": str(tmp_path), "device": "cpu", "kernels": kernels})
    found = "float32" if is_half_slow else half
    assert open_model("m", config).storage.name == found
    assert f"weights in {found}, for on this CPU a matrix takes" in caplog.text
    assert "1.00 ms in float32" in caplog.text
    measuring.fastest_type.cache_clear()


def test_compiled_kernels_that_are_not_to_be_had_are_refused_with_the_cause(
    worded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks for them by name has a speed in mind that plain torch has not."""
    monkeypatch.setattr(loading, "library", _no_library)
    config = ModelConfig(checkpoint=str(worded_checkpoint), device="cpu", kernels="compiled")
    with pytest.raises(SetupError, match="none for it: no C\\+\\+ compiler is installed.*kernels: auto"):
        open_model("m", config)


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_weights_run_on_plain_torch_in_the_memory_that_was_planned(
    worded_checkpoint: Path, kind: Literal["int8", "int4", "float8"]
) -> None:
    """On any device, without a compiler; never as the floats that they are made of."""
    config = ModelConfig(checkpoint=str(worded_checkpoint), device="cpu", dtype=kind, kernels="plain")
    opened = open_model("m", config)
    assert opened.storage == TorchStorage(torch.float32, kind)
    assert opened.facts.dtype == kind
    model = load_model(opened.checkpoint, device="cpu", dtype=torch.float32, rounding=kind)
    assert opened.plan.weight_bytes == sum(weight.nbytes for weight in model.state_dict().values())
    assert opened.plan.loading_bytes == opened.plan.weight_bytes + 856 * 64 * 4
    executor = opened.load(WORDED.vocab_size)
    assert None not in executor.execute(Batch([1, 2, 3], [0], [3], [[0]], [2]), [Choice()])
    executor.close()


def test_where_blocks_are_read_in_place_they_are_as_large_as_the_kernel_wants(
    worded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a draft network as well, which shares the tables; and the plan counts in them."""
    monkeypatch.setattr(loading, "has_flash", lambda *_: True)
    config = {"checkpoint": str(worded_checkpoint), "device": "cpu", "kernels": "plain", "max_sequences": 3}
    opened = open_model("m", ModelConfig.model_validate(config | {"draft": {"checkpoint": str(worded_checkpoint)}}))
    assert (opened.plan.blocks, opened.plan.block_tokens, opened.plan.cache_tokens) == (3, 256, 768)
    assert (opened.facts.block_tokens, opened.static_rows) == (256, 0)
    executor = opened.load(WORDED.vocab_size)
    assert executor.block_tokens == 256
    assert None not in executor.execute(Batch([1, 2, 3], [0], [3], [[2]], [2]), [Choice()])
    executor.close()


def test_compiled_graphs_are_refused_where_there_is_nothing_to_compile_with(
    worded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before weights are read, not in the middle of the first capture."""
    monkeypatch.setattr(loading, "_device", lambda *_: torch.device("cuda:0"))
    monkeypatch.setattr(loading, "_gpu_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(loading, "has_flash", lambda *_: True)
    monkeypatch.setattr(loading, "available_memory", lambda *_: 1 << 30)
    config = ModelConfig(checkpoint=str(worded_checkpoint), cuda_graphs="compiled")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="no triton to compile with; install it, or set cuda_graphs: true"):
        open_model("m", config)
    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    found = [open_model("m", config.model_copy(update={"cuda_graphs": asked})) for asked in ("compiled", True, False)]
    assert [(one.static_rows, one.compiler) for one in found] == [(32, "inductor"), (32, None), (0, None)]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_float8_takes_a_gpu_that_multiplies_it(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """An older one would fail in its first step."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if capability == (8, 9):
        loading._check_float8("m", torch.device("cuda:0"))
        return
    with pytest.raises(SetupError, match=r"compute capability 8\.9 or more; cuda:0 has 8\.0; set dtype: int8"):
        loading._check_float8("m", torch.device("cuda:0"))


def test_without_a_compiler_a_model_runs_on_plain_torch_and_says_why(
    worded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A machine without g++ is slower, not broken."""
    monkeypatch.setattr(loading, "library", _no_library)
    caplog.set_level(logging.INFO)
    assert open_model("m", ModelConfig(checkpoint=str(worded_checkpoint), device="cpu")).storage == TorchStorage(
        torch.float32
    )
    assert "runs on plain torch, for there are no compiled kernels: no C++ compiler is installed (g++)" in caplog.text


def _no_library() -> None:
    raise KernelsUnavailableError("no C++ compiler is installed (g++)")


def test_the_context_is_what_was_asked_for_up_to_what_the_checkpoint_was_made_for(worded_checkpoint: Path) -> None:
    """Positions beyond the trained ones give nonsense, so more is refused and never cut."""
    assert (
        open_model("m", ModelConfig(checkpoint=str(worded_checkpoint), device="cpu", context_tokens=50)).plan.context
        == 50
    )
    with pytest.raises(SetupError, match="context_tokens is 129, and the checkpoint was made for 128"):
        open_model("m", ModelConfig(checkpoint=str(worded_checkpoint), device="cpu", context_tokens=129))


@NEEDS_KERNELS
def test_a_context_that_does_not_fit_is_refused_and_by_default_as_much_as_fits_is_taken(
    worded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The error carries the plan, with the longest context that would fit, before any weight is read."""
    weights, per_block = WORDED.parameter_count * 4, 16 * 512
    monkeypatch.setattr(loading, "available_memory", lambda device: weights + 4 * per_block)
    asked = ModelConfig(checkpoint=str(worded_checkpoint), device="cpu", context_tokens=65)
    with pytest.raises(SetupError, match=r"does not fit the memory: .* longest that fits: 64;"):
        open_model("m", asked)
    assert open_model("m", asked.model_copy(update={"context_tokens": 64})).plan.blocks == 4
    with pytest.raises(SetupError, match=r"does not fit the memory: .*\(80 tokens of 512 B\)"):
        open_model("m", ModelConfig(checkpoint=str(worded_checkpoint), device="cpu", cache_tokens=65))
    monkeypatch.setattr(loading, "available_memory", lambda device: 2 * (weights + 4 * per_block))
    assert open_model("m", ModelConfig(checkpoint=str(worded_checkpoint), device="cpu")).plan.context == 64
    assert [record.getMessage() for record in caplog.records] == [
        "model 'm': the context is 64 of the 128 tokens that it was made for; more do not fit the cache"
    ]
    monkeypatch.setattr(loading, "available_memory", lambda device: weights)
    with pytest.raises(SetupError, match="does not fit the memory"):
        open_model("m", ModelConfig(checkpoint=str(worded_checkpoint), device="cpu"))


@pytest.mark.parametrize("key", ["checkpoint", "draft.checkpoint"])
def test_a_folder_that_is_not_there_is_named_with_its_model_and_its_key(worded_checkpoint: Path, key: str) -> None:
    """With three models in a file, a path alone does not say which line to mend."""
    asked: dict[str, Any] = {"checkpoint": str(worded_checkpoint), "device": "cpu"}
    asked |= {"checkpoint": "/nowhere"} if key == "checkpoint" else {"draft": {"checkpoint": "/nowhere"}}
    with pytest.raises(CheckpointError, match=f"^model 'm', {key}: /nowhere: no such folder$"):
        open_model("m", ModelConfig.model_validate(asked))

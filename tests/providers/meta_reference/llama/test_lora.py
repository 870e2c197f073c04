"""Adapter folders: what peft writes is read, and what would give wrong answers is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_stack_meta_reference.llama.checkpoint import open_checkpoint
from llama_stack_meta_reference.llama.config import LlamaConfig
from llama_stack_meta_reference.llama.lora import load_adapter
from safetensors.torch import load_file, save_file

from llama_stack.errors import CheckpointError
from tests.providers.meta_reference.adapters import tuned
from tests.providers.meta_reference.checkpoints import random_reference, write_hugging_face

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> LlamaConfig:
    return open_checkpoint(write_hugging_face(random_reference(), tmp_path_factory.mktemp("base"))).config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tuned(random_reference(), tmp_path)
    return tmp_path


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


def test_an_adapter_of_peft_is_read_whole(folder: Path, network: LlamaConfig) -> None:
    """Seven matrices of each layer, with the scale in one of the halves."""
    adapter = load_adapter(folder, network)
    assert adapter.rank == 8
    assert len(adapter.pairs) == 7 * network.n_layers
    stored = load_file(folder / "adapter_model.safetensors")
    pair = adapter.pairs["layers.0.attention.wq"]
    assert torch.equal(pair.down_RI, stored[f"{FIRST}.lora_A.weight"])
    assert torch.equal(pair.up_OR, stored[f"{FIRST}.lora_B.weight"] * 2)


def test_the_scale_of_rank_stabilised_adapters_is_another(folder: Path, network: LlamaConfig) -> None:
    """alpha through the root of the rank: peft writes a flag, and the weights do not show it."""
    configure(folder, use_rslora=True)
    stored = load_file(folder / "adapter_model.safetensors")
    expected = stored[f"{FIRST}.lora_B.weight"] * (16 / 8**0.5)
    assert torch.allclose(load_adapter(folder, network).pairs["layers.0.attention.wq"].up_OR, expected)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora 'True' is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"r": "absent"}, "r must be a whole number"),
        ({"r": True}, "r must be a whole number"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": 100_000}, "from 1 to 512"),
        ({"r": 4}, "floats of"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number"),
        ({"lora_alpha": 1e999}, "lora_alpha must be a number"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' is not supported"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_its_name(
    folder: Path, network: LlamaConfig, changes: dict[str, Any], cause: str
) -> None:
    """A field that is passed over gives wrong answers, not an error."""
    configure(folder, **changes)
    with pytest.raises(CheckpointError, match=cause):
        load_adapter(folder, network)


def _renamed(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda t: _renamed(t, "layers.1.", "layers.9."), "layers.9.* adds to no matrix"),
        (lambda t: _renamed(t, "self_attn.q_proj", "self_attn.z_proj"), "z_proj.* adds to no matrix"),
        (lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.zeros(8, 64)}, "lm_head.* adds to no matrix"),
        (lambda t: t | {f"{FIRST}.lora_magnitude_vector": torch.zeros(64)}, "lora_magnitude_vector"),
        (lambda t: t | {f"{FIRST}.lora_A.weight": torch.zeros(8, 65)}, r"shape \[8, 65\]; needed: floats of \[8, 64\]"),
        (lambda t: t | {f"{FIRST}.lora_A.weight": torch.zeros(8, 64, dtype=torch.int8)}, "torch.int8"),
        (lambda t: t | {f"{FIRST}.lora_A.weight": torch.full((8, 64), torch.nan)}, "NaN or infinity"),
        (lambda t: {k: v for k, v in t.items() if k != f"{FIRST}.lora_B.weight"}, "wq has lora_A or lora_B alone"),
        (lambda t: {}, "it is empty"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, network: LlamaConfig, change: Any, cause: str) -> None:
    """Another model's adapter, half of one, a damaged one."""
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(CheckpointError, match=cause):
        load_adapter(folder, network)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_is_not_whole_is_refused(folder: Path, network: LlamaConfig, missing: str) -> None:
    """The error names the file; and a folder that is not there, and one cut short, are no crash either."""
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        load_adapter(folder, network)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_adapter(folder / "nowhere", network)
    (folder / "adapter_model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError):
        load_adapter(folder, network)

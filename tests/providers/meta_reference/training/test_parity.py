"""Gradients and exports beside transformers' and peft's, on the same weights and the same sequences."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from llama_stack_meta_reference.llama.checkpoint import load_model, open_checkpoint
from llama_stack_meta_reference.llama.safetensors_weights import hugging_face_name
from llama_stack_meta_reference.training.network import Network, add_adapters, freeze, keep_trained_in_float32
from llama_stack_meta_reference.training.plan import AdapterSettings
from llama_stack_meta_reference.training.samples import Sample, pack
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.providers.meta_reference import small_tokenizer
from tests.providers.meta_reference.adapters import ALL_TARGETS
from tests.providers.meta_reference.checkpoints import random_reference, scaled_rope, write_hugging_face
from tests.providers.meta_reference.training.jobs import make_job, train

TOLERANCE = 1e-4
"""Relative, in float32."""


@pytest.fixture
def reference() -> LlamaForCausalLM:
    return random_reference(rope=scaled_rope(8.0, 32))


def sequences() -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in (9, 31, 18):
        tokens = torch.randint(0, 256, (length,), generator=generator).tolist()
        made.append(Sample(tuple(tokens), tuple(place > length // 3 for place in range(length))))
    return made


def reference_loss(model: Any) -> Tensor:
    """What transformers makes of the same labels: each sequence by itself, the sum over all."""
    total = torch.zeros(())
    for sample in sequences():
        tokens = torch.tensor([sample.tokens])
        logits = model(input_ids=tokens).logits[0, :-1]
        labels = torch.tensor([t if is_learnt else -100 for t, is_learnt in zip(*astuple(sample), strict=True)])[1:]
        total = total + F.cross_entropy(logits, labels, reduction="sum")
    return total


def astuple(sample: Sample) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    return sample.tokens, sample.learnt


def ours(reference: LlamaForCausalLM, folder: Path) -> Network:
    checkpoint = open_checkpoint(write_hugging_face(reference, folder))
    return Network(load_model(checkpoint, device="cpu", dtype=torch.float32))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def theirs_name(name: str) -> str:
    return hugging_face_name(name.removeprefix("llama.").removeprefix("head."))


@pytest.mark.parametrize("tied", [True, False])
def test_full_gradients_are_those_of_transformers(tied: bool, tmp_path: Path) -> None:
    reference = random_reference(rope=scaled_rope(8.0, 32), tied=tied)
    network = ours(reference, tmp_path)
    keep_trained_in_float32(network)
    loss = -network(pack(sequences()), "sum")
    loss.backward()
    expected = reference_loss(reference)
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = dict(reference.named_parameters())
    for name, weight in network.trained.items():
        assert weight.grad is not None
        gradient = theirs[theirs_name(name)].grad
        assert gradient is not None
        assert relative_error(weight.grad, gradient) < TOLERANCE, name
    assert len(network.trained) == len(theirs)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("has_output", [False, True])
def test_adapter_gradients_are_those_of_peft(
    use_dora: bool, has_output: bool, reference: LlamaForCausalLM, tmp_path: Path
) -> None:
    """On adapters that are in the midst of their training: what begins at nothing hides faults."""
    network = ours(reference, tmp_path)
    freeze(network, is_rounded=False)
    settings = AdapterSettings(rank=4, alpha=12, is_on_output=has_output)
    add_adapters(network, settings, 0, has_magnitude=use_dora)
    targets: list[str] = [*ALL_TARGETS, "lm_head"] if has_output else ALL_TARGETS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = get_peft_model(reference, LoraConfig(r=4, lora_alpha=12, target_modules=targets, use_dora=use_dora))
    pairs = {}
    for name, weight in network.trained.items():
        matrix, _, part = name.rpartition(".")
        kind = {"down": "lora_A", "up": "lora_B", "magnitude": "lora_magnitude_vector"}[part]
        weights = dict(theirs.named_parameters())
        (name,) = [n for n in weights if n.startswith(f"base_model.model.{theirs_name(matrix)}.{kind}.")]
        pairs[name] = weight, weights[name]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for mine, other in pairs.values():
            mine.add_(torch.randn(mine.shape, generator=generator), alpha=0.1)
            other.copy_(mine)
    assert len(pairs) == (14 + has_output) * (2 + use_dora)
    loss = -network(pack(sequences()), "sum")
    loss.backward()
    expected = reference_loss(theirs)
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, (mine, other) in pairs.items():
        assert mine.grad is not None
        assert other.grad is not None
        assert relative_error(mine.grad, other.grad) < TOLERANCE, name
    assert all(weight.grad is None for weight in network.parameters() if not weight.requires_grad)


def probe(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([sequences()[1].tokens])).logits[0]
    return logits


def small_base(folder: Path) -> Path:
    reference = random_reference(vocabulary=856, rope=scaled_rope(8.0, 32))
    write_hugging_face(reference, folder)
    small_tokenizer.write_hugging_face(folder)
    return folder


@pytest.mark.parametrize("algorithm", ["lora", "dora"])
@pytest.mark.parametrize("has_output", [False, True])
def test_an_adapter_loads_in_peft_and_a_merged_one_in_transformers(
    algorithm: str, has_output: bool, tmp_path: Path
) -> None:
    """Both are one model: what is worked into the weights is what the adapter adds."""
    base = small_base(tmp_path / "base")
    settings = {"is_on_output": has_output}
    adapted = make_job(tmp_path / "adapted", base, algorithm=algorithm, adapter_settings=settings)
    train(adapted)
    merged = make_job(tmp_path / "merged", base, algorithm=algorithm, adapter_settings=settings | {"is_merged": True})
    train(merged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with_adapter = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapted / "result"))
    whole = LlamaForCausalLM.from_pretrained(merged / "result")
    plain = probe(LlamaForCausalLM.from_pretrained(base))
    assert relative_error(probe(whole), plain) > 0.01, "the training has changed nothing that could be compared"
    assert relative_error(probe(with_adapter), probe(whole)) < TOLERANCE


def test_a_whole_model_loads_in_transformers(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", small_base(tmp_path / "base"), algorithm="full")
    network = train(job).network
    whole = LlamaForCausalLM.from_pretrained(job / "result")
    with torch.no_grad():
        tokens = torch.tensor([sequences()[1].tokens])
        states = network.llama.hidden(tokens)
        assert network.head.output is not None
        assert relative_error(probe(whole), network.head.output(states)[0]) < TOLERANCE

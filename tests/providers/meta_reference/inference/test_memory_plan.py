from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llama_stack_meta_reference.inference import memory_plan as module
from llama_stack_meta_reference.inference.memory_plan import available_memory, memory_plan
from llama_stack_meta_reference.inference.native_runner import NativeStorage
from llama_stack_meta_reference.inference.runner import TorchStorage
from llama_stack_meta_reference.llama.config import LlamaConfig

from tests.providers.meta_reference.small_llama import SMALL

GIB = 1 << 30

LLAMA_3_1_8B = LlamaConfig.from_meta(
    {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    }
)


def test_plan_of_a_published_model_matches_its_published_figures() -> None:
    """8,030,261,248 weights, and 128 KiB of bfloat16 cache a token: 32 layers x 8 heads x 128 x 2 x 2 bytes."""
    plan = memory_plan(
        LLAMA_3_1_8B, TorchStorage(torch.bfloat16), "cuda:0", available_bytes=24 * GIB, cache_tokens=32768
    )
    assert plan.weight_bytes == 2 * 8_030_261_248
    assert plan.cache_bytes_per_token == 128 * 1024
    assert plan.cache_bytes == 4 * GIB
    assert plan.fits
    assert str(plan) == (
        "cuda:0: weights 14.96 GiB + cache 4 GiB (32768 tokens of 128 KiB) = 18.96 GiB of 24 GiB free; "
        "context 32768 tokens, longest that fits: 74064"
    )


def test_weights_that_are_rounded_must_fit_before_they_are() -> None:
    """A checkpoint is read whole and then packed: a plan of the packed weights alone would end in a killed process."""
    storage = NativeStorage("int4", torch.bfloat16)
    small, roomy = (
        memory_plan(LLAMA_3_1_8B, storage, "cpu", available_bytes=available * GIB, cache_tokens=32768)
        for available in (14, 16)
    )
    assert small.total_bytes < 10 * GIB
    assert small.loading_bytes == 2 * 8_030_261_248
    assert (small.fits, roomy.fits) == (False, True)
    assert small.longest_context == 0 < 32768 <= roomy.longest_context
    assert "weights 4.91 GiB (14.96 GiB while loaded) + cache 4 GiB" in str(small)


def test_the_longest_context_is_the_most_that_fits() -> None:
    """The figure is what an operator will write into the YAML: one block more must not fit."""
    available = SMALL.parameter_count * 4 + 100 * 256
    plan = memory_plan(
        SMALL, TorchStorage(torch.float32), "cpu", available_bytes=available, context_tokens=SMALL.max_context
    )
    assert not plan.fits
    assert plan.longest_context == 96
    for context, fits in ((96, True), (97, False)):
        assert (
            memory_plan(
                SMALL, TorchStorage(torch.float32), "cpu", available_bytes=available, context_tokens=context
            ).fits
            is fits
        )


def test_by_default_everyone_has_a_whole_context_or_all_share_what_there_is() -> None:
    """More than that would lie idle; less is shared, and a step and other programs need the rest of the memory."""
    roomy = memory_plan(SMALL, TorchStorage(torch.float32), "cpu", available_bytes=GIB, max_sequences=5)
    assert (roomy.context, roomy.cache_tokens) == (128, 5 * 128)
    available = 2 * (SMALL.parameter_count * 4 + 300 * 256)
    tight = memory_plan(
        SMALL, TorchStorage(torch.float32), "cpu", available_bytes=available, share=0.5, max_sequences=5
    )
    assert (tight.context, tight.cache_tokens) == (128, 288)
    short = memory_plan(
        SMALL, TorchStorage(torch.float32), "cpu", available_bytes=available, share=0.25, max_sequences=5
    )
    assert (short.context, short.cache_tokens, short.fits) == (0, 0, False)


def test_the_cache_is_what_was_asked_for_and_the_context_no_more_than_it() -> None:
    """An operator who fixes the cache has other plans for the rest."""
    plan = memory_plan(SMALL, TorchStorage(torch.float32), "cpu", available_bytes=GIB, max_sequences=5, cache_tokens=40)
    assert (plan.context, plan.cache_tokens) == (48, 48)
    plan = memory_plan(
        SMALL, TorchStorage(torch.float32), "cpu", available_bytes=GIB, cache_tokens=1000, context_tokens=50
    )
    assert (plan.context, plan.cache_tokens) == (50, 1008)


def test_large_blocks_are_counted_whole() -> None:
    """What does not fill a block takes it all the same."""
    plan = memory_plan(
        SMALL, TorchStorage(torch.float32), "cuda:0", available_bytes=GIB, max_sequences=5, block_tokens=256
    )
    assert (plan.blocks, plan.cache_tokens, plan.context) == (5, 1280, 128)
    assert plan.cache_bytes == 1280 * plan.cache_bytes_per_token


def test_the_longest_context_ends_at_the_models_own() -> None:
    """More memory does not teach a model positions it never saw."""
    assert (
        memory_plan(SMALL, TorchStorage(torch.float32), "cpu", available_bytes=GIB).longest_context == SMALL.max_context
    )


def test_no_context_fits_where_the_weights_do_not() -> None:
    """Zero, not a negative number."""
    plan = memory_plan(SMALL, TorchStorage(torch.float32), "cpu", available_bytes=1000)
    assert (plan.longest_context, plan.fits) == (0, False)


def test_memory_of_this_machine_is_a_real_figure() -> None:
    """Some memory, and no more than the address space of a machine."""
    assert 0 < available_memory("cpu") < 1 << 50


@pytest.mark.parametrize(
    ("version", "limit_file", "use_file", "reclaimable"),
    [
        (0, "memory.max", "memory.current", "inactive_file"),
        (1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_containers_limit_counts_without_the_files_it_has_read(
    version: int, limit_file: str, use_file: str, reclaimable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond it the kernel ends the process; and a checkpoint in the page cache must not count against itself."""
    folders = [tmp_path / "v2", tmp_path / "v1"]
    folder = folders[version]
    folder.mkdir()
    (folder / limit_file).write_text("9000000\n")
    (folder / use_file).write_text("8000000\n")
    (folder / "memory.stat").write_text(f"anon 1\n{reclaimable} 6000000\n")
    monkeypatch.setattr(
        module, "_CGROUPS", [(f, *names) for f, (_, *names) in zip(folders, module._CGROUPS, strict=True)]
    )
    assert available_memory("cpu") == 7_000_000


def test_a_container_without_a_limit_has_the_machines_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cgroup v2 says then is no number."""
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(module, "_CGROUPS", [(tmp_path, *module._CGROUPS[0][1:])])
    assert available_memory("cpu") > 7_000_000

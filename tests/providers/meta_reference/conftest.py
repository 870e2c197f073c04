"""Small models that the tests of this plugin share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from llama_stack_meta_reference.llama.checkpoint import save_hugging_face
from llama_stack_meta_reference.llama.model import Llama
from llama_stack_meta_reference.native import library as module
from llama_stack_meta_reference.native.library import library

from tests.providers.meta_reference import small_tokenizer
from tests.providers.meta_reference.small_llama import SMALL, WORDED


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small tensors gain nothing from threads, and workers that share cores lose much by them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_model() -> Llama:
    """A random float32 network of 0.1 million weights, with scaled rope and grouped queries; not to be changed."""
    model = Llama(SMALL, device="cpu", dtype=torch.float32)
    model.initialize(torch.Generator().manual_seed(0), std=0.2)
    return model


@pytest.fixture
def small_checkpoint(small_model: Llama, tmp_path: Path) -> Path:
    """A folder of its own with ``small_model`` in Hugging Face's layout, without a tokenizer."""
    folder = tmp_path / "small"
    save_hugging_face(small_model, folder, eos_ids=[3, 5])
    return folder


@pytest.fixture
def worded_checkpoint(tmp_path: Path) -> Path:
    """A folder of its own with a random network and a tokenizer that belong together, in Hugging Face's layout."""
    model = Llama(WORDED, device="cpu", dtype=torch.float32)
    model.initialize(torch.Generator().manual_seed(0))
    folder = tmp_path / "worded"
    save_hugging_face(model, folder, eos_ids=[7])
    small_tokenizer.write_hugging_face(folder)
    return folder


@pytest.fixture(scope="module", params=["native", "x86-64-v3"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels as they are compiled for this machine, and for one with AVX2 alone.

    Many machines have no more than AVX2, and none of ours would notice that those kernels are wrong.
    """
    flag = module._PROCESSOR_FLAG
    module._PROCESSOR_FLAG = f"-march={request.param}"
    library.cache_clear()
    yield request.param
    module._PROCESSOR_FLAG = flag
    library.cache_clear()

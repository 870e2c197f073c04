"""From a model's configuration to a running engine, in a process of its own or in this one."""

from __future__ import annotations

from pathlib import Path

import pytest
from llama_stack_meta_reference.config import ModelConfig
from llama_stack_meta_reference.inference.serving import load
from llama_stack_meta_reference.llama.tokenizer import load_tokenizer

from llama_stack.errors import CheckpointError
from tests.providers.meta_reference import small_tokenizer


def test_generations_end_at_the_tokenizers_and_the_folders_stop_tokens(worded_checkpoint: Path) -> None:
    """A checkpoint may name further ids that end a generation, beside those of the chat format."""
    engine = load("m", ModelConfig(checkpoint=str(worded_checkpoint), device="cpu"), None).engine
    names = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    tokenizer = load_tokenizer(worded_checkpoint / "tokenizer.json")
    assert engine._stop_ids == {7, *(tokenizer.specials[name] for name in names)}


def test_the_settings_reach_the_engine(worded_checkpoint: Path) -> None:
    """A key that is accepted and ignored is worse than one that is refused."""
    config = ModelConfig(
        checkpoint=str(worded_checkpoint),
        device="cpu",
        context_tokens=40,
        cache_tokens=100,
        max_sequences=3,
        queue_size=7,
        prefill_tokens=9,
        lookup_tokens=5,
        prefix_reuse=False,
    )
    engine = load("m", config, None).engine
    scheduler = engine._scheduler
    assert (engine.context, engine.blocks, scheduler.max_sequences, scheduler.queue_size) == (40, 7, 3, 7)
    assert (scheduler.prefill_tokens, scheduler.draft_tokens, scheduler.prefix_reuse) == (9, 5, False)


def test_a_tokenizer_of_another_model_is_refused(small_checkpoint: Path) -> None:
    """Ids beyond the embedding would crash the first request that holds them."""
    small_tokenizer.write_hugging_face(small_checkpoint)
    with pytest.raises(CheckpointError, match="has 770 tokens, and the network beside it knows 256"):
        load("m", ModelConfig(checkpoint=str(small_checkpoint), device="cpu"), None)


def test_a_folder_without_a_tokenizer_is_refused(small_checkpoint: Path) -> None:
    """Weights alone cannot be served, and the error names both files that would do."""
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load("m", ModelConfig(checkpoint=str(small_checkpoint), device="cpu"), None)

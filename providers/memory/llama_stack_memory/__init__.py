"""Memory banks: documents that are kept, found and forgotten. See ``plugin.py`` for the providers."""

from .config import MemoryConfig
from .interfaces import Chunk, ChunkSettings, Embedder

__all__ = ["Chunk", "ChunkSettings", "Embedder", "MemoryConfig"]

"""Search among vectors, in memory."""

from .exact import ExactIndex
from .hnsw import HnswIndex, has_faiss

__all__ = ["ExactIndex", "HnswIndex", "has_faiss"]

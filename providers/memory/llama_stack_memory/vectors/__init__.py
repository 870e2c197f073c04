"""Search among vectors, in memory."""

from .exact import ExactIndex

__all__ = ["ExactIndex"]

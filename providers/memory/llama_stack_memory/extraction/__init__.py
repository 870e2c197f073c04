"""The text of documents, whatever they are, read by a process that may be killed."""

from .extractor import Extractor

__all__ = ["Extractor"]

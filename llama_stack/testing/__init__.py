"""For those who write plugins, and for our own tests: samples and stubs made from the contracts."""

from .samples import arguments, sample, scripted

__all__ = ["arguments", "sample", "scripted"]

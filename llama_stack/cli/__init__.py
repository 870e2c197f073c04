"""The command line, ``llama-stack``."""

from .commands import main

__all__ = ["main"]

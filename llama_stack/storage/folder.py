"""A folder of one owner, for files that programs read by their path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folder:
    """A folder on this machine, open to its owner only, that lies beside the store and lasts as long.

    For what is neither a row nor a blob: weights, and whatever child processes read and write by name. What is in it
    the owner makes durable itself, and a name that a client sent is never part of a path.
    """

    path: Path
    """Absolute; the folder is there."""

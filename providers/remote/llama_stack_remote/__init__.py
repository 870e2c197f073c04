"""Any API of a stack, served by another stack: ``provider: remote`` with the other one's address."""

from .config import RemoteConfig

__all__ = ["RemoteConfig"]

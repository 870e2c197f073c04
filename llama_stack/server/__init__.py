"""A stack over HTTP."""

from .app import StackApp, create_app

__all__ = ["StackApp", "create_app"]

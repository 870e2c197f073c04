"""A stack over HTTP."""

from .app import StackApp, create_app
from .process import Listener, listening, serve

__all__ = ["Listener", "StackApp", "create_app", "listening", "serve"]

"""Clients of a stack, over HTTP or in this process: every API as its contract, errors as the classes in ``errors``."""

from .asynchronous import AsyncClient
from .connection import Connection, Timeouts
from .forms import BlockingApi, blocking
from .remote import RemoteApis
from .replies import BlockingStream, Stream, chunks, whole
from .synchronous import Client

__all__ = [
    "AsyncClient",
    "BlockingApi",
    "BlockingStream",
    "Client",
    "Connection",
    "RemoteApis",
    "Stream",
    "Timeouts",
    "blocking",
    "chunks",
    "whole",
]

"""``llama-stack run``: serve a distribution until told to stop."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    pass


@click.command(name="run")
@click.argument("distribution", metavar="NAME|FILE")
@click.option("--host", metavar="HOST", help="Listen on this address in place of the distribution's.")
@click.option("--port", type=click.IntRange(0, 65_535), help="Listen on this port; 0 takes any free one.")
def command(distribution: str, host: str | None, port: int | None) -> int:
    """Serve a distribution until told to stop.

    Name a YAML file, or one of the distributions that `llama-stack list distributions` shows.
    """
    from ..distribution import ServerConfig, load_distribution
    from ..registry import Registry
    from ..server import serve
    from ..stack import Stack

    registry = Registry()
    found = load_distribution(distribution, environ=os.environ, registry=registry)
    changes = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    config = ServerConfig.model_validate(found.server.model_dump() | changes)
    stack = Stack(found.model_copy(update={"server": config}), registry)
    return serve(stack, config)

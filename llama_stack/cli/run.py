"""``llama-stack run``: serve a distribution until told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import StackError
from .options import plugins_dir, registry

if TYPE_CHECKING:
    from ..stack import Stack


logger = logging.getLogger("llama_stack.cli")


@click.command(name="run")
@click.argument("distribution", metavar="NAME|FILE")
@click.option("--host", metavar="HOST", help="Listen on this address in place of the distribution's.")
@click.option("--port", type=click.IntRange(0, 65_535), help="Listen on this port; 0 takes any free one.")
@plugins_dir
def command(distribution: str, host: str | None, port: int | None, plugins_dir: Path | None) -> int:
    """Serve a distribution until told to stop.

    Name a YAML file, or one of the distributions that `llama-stack list distributions` shows.
    """
    from pydantic import ValidationError

    from ..distribution import ServerConfig, load_distribution, verified_lock
    from ..server import serve
    from ..stack import Stack

    known = registry(plugins_dir)
    found = load_distribution(distribution, environ=os.environ, registry=known)
    changes = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    try:
        config = ServerConfig.model_validate(found.server.model_dump() | changes)
    except ValidationError as error:  # the port has been judged with the other options
        raise click.BadParameter("name a host or an address of this machine", param_hint="'--host'") from error
    lock = verified_lock(distribution, found, known, os.environ)
    stack = Stack(found.model_copy(update={"server": config}), known, lock=lock)
    announcements: list[asyncio.Task[None]] = []  # held here, for the loop itself holds a task weakly

    def announce(address: str) -> None:
        announcements.append(asyncio.get_running_loop().create_task(_announce(stack, address)))

    return serve(stack, config, on_ready=announce)


async def _announce(stack: Stack, address: str) -> None:
    """Print where the stack answers, who provides what, its faces, and every model with the device it runs on."""
    lines = [f"{stack.distribution.name} answers at {address}"]
    for provider in stack.status():
        name = provider.id if provider.id == provider.provider else f"{provider.id} ({provider.provider})"
        took = "" if provider.start_seconds is None else f" after {provider.start_seconds:.1f} s"
        why = "" if provider.reason is None else f": {provider.reason}"
        lines.append(f"  {provider.api}: {name} is {provider.state}{took}{why}")
        notice = (provider.details or {}).get("notice")
        lines += [] if notice is None else [f"    {notice}"]
    lines += [f"  face: {name} is ready" for name in stack.faces]
    click.echo("\n".join(lines))
    try:
        for line in await _models(stack):
            click.echo(line)
    except Exception as error:  # such as that of a remote stack that has just left; nobody waits for this task
        trace = None if isinstance(error, StackError) else error
        logger.warning("the models cannot be listed: %s", error, exc_info=trace)


async def _models(stack: Stack) -> list[str]:
    from ..apis import Models

    served = [model async for model in await stack.api(Models).list_models()]
    lines = []
    for model in served:
        if model.alias_of is None:
            device = "" if model.device is None else f" on {model.device}"
            context = "" if model.context_tokens is None else f", {model.context_tokens} tokens of context"
            names = ", ".join(other.model for other in served if other.alias_of == model.model)
            lines.append(f"  model {model.model}{device}{context}" + (f", also as {names}" if names else ""))
    return lines

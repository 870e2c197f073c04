"""``llama-stack lock``: pin what a distribution runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from .options import plugins_dir, registry


@click.command(name="lock")
@click.argument("file", type=click.Path(dir_okay=False))
@plugins_dir
def command(file: str, plugins_dir: Path | None) -> None:
    """Write FILE.lock: versions and hashes of the plugins, and a digest of what the distribution says.

    From then on `run FILE` refuses to start when any of that has changed, and GET /version shows the digest.
    """
    from ..distribution import load_distribution, lock_digest, lock_path, make_lock, shipped_distributions
    from ..errors import SetupError

    if file in shipped_distributions():
        raise SetupError(
            f"{file!r} is shipped, and its lock would lie with it; write a file that says 'extends: {file}'"
        )
    known = registry(plugins_dir)
    lock = make_lock(file, load_distribution(file, environ=os.environ, registry=known), known, os.environ)
    path = lock_path(file)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(lock, indent=2) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise SetupError(f"{path} cannot be written: {error.strerror}") from error
    click.echo(f"{path}: {len(lock['plugins'])} plugins, {lock_digest(lock)}")

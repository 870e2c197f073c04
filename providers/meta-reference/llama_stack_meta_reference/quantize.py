"""Rounds a model folder once, so that it need not be rounded at each start and takes half the room, or a quarter.

python -m llama_stack_meta_reference.quantize SOURCE TARGET --dtype int8
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click
from safetensors import SafetensorError

from llama_stack.errors import CheckpointError, SetupError, StackError

from .llama.checkpoint import load_model, open_checkpoint, save_hugging_face
from .llama.quantize import KINDS


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write the model of ``source``, its matrices rounded to one of ``quantize.KINDS``, into the new folder ``target``.

    It is written beside its place and gets its name when it is whole. Takes the memory of the rounded model and of one
    weight. Raises ``CheckpointError`` for a bad folder and for one that is rounded already, ``SetupError`` for
    a target that cannot be made or written.
    """
    checkpoint = open_checkpoint(source)
    if checkpoint.rounding is not None:
        raise CheckpointError(f"{source}: is {checkpoint.rounding} already; round the folder that it was made from")
    if target.exists():
        raise SetupError(f"{target} is there already; remove it, or name another folder")
    aside = target.with_name(f"{target.name}.part")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise SetupError(f"{aside} cannot be made: {error.strerror}; remove what is left of it") from None
    try:
        model = load_model(checkpoint, device="cpu", dtype=checkpoint.dtype, rounding=kind)
        if checkpoint.tokenizer_file is not None:
            shutil.copyfile(checkpoint.tokenizer_file, aside / checkpoint.tokenizer_file.name)
        save_hugging_face(model, aside, eos_ids=checkpoint.eos_ids)
        open_checkpoint(aside)
        aside.rename(target)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise SetupError(f"{target} cannot be written: {error}") from None
        raise


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--dtype", "kind", type=click.Choice([*KINDS]), required=True, help="What to round matrices to.")
def command(source: Path, target: Path, kind: str) -> None:
    """Round the matrices of the model in SOURCE and write it to the new folder TARGET."""
    try:
        quantize(source.expanduser(), target.expanduser(), kind)
    except StackError as refused:
        click.echo(f"error: {refused}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    command()

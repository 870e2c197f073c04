"""``llama-stack complete``: continue a text."""

from __future__ import annotations

import sys

import click

from .generation import Generation, generation_options


@click.command(name="complete")
@generation_options
@click.argument("text")
def command(generation: Generation, text: str) -> int:
    """Continue a text with a model.

    What the model writes after TEXT is printed as it comes; - reads TEXT from stdin.
    """
    from ..apis.inference import CompletionRequest
    from ..client import chunks

    with generation.client() as client:
        request = CompletionRequest(
            model=generation.model_of(client),
            content=sys.stdin.read() if text == "-" else text,
            sampling_params=generation.sampling_params,
            max_tokens=generation.max_tokens,
            stream=True,
        )
        with chunks(client.inference.completion(request)) as stream:
            for chunk in stream:
                click.echo(chunk.text_delta, nl=False)
                sys.stdout.flush()
        click.echo()
    return 0

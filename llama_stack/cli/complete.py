"""``llama-stack complete``: continue a text."""

from __future__ import annotations

import click

from .generation import Generation, generation_options, text_or_stdin, valid_request
from .output import write


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
        model = generation.model_of(client)
        with valid_request():
            request = CompletionRequest(
                model=model,
                content=text_or_stdin(text),
                sampling_params=generation.sampling_params,
                max_tokens=generation.max_tokens,
                stream=True,
            )
        with chunks(client.inference.completion(request)) as stream:
            for chunk in stream:
                write(chunk.text_delta)
        click.echo()
    return 0

"""Turns the tokens of one reply into what a client reads: whole characters, whole tool calls, log-probabilities.

Streamed and whole replies are both made here, from the same pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama_stack.apis.common import Json, ToolCall, ToolDefinition

from ..llama.tokenizer import TextDecoder, Tokenizer
from ..llama.tool_calls import ToolCallParser
from .sampler import SampledToken


class Reply:
    """One reply as it is written. Special tokens are no part of its text."""

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[ToolDefinition] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = TextDecoder(tokenizer)
        self._parser = ToolCallParser(tools)
        self._written = 0
        self._scored: list[tuple[SampledToken, int]] = []

    def feed(self, sampled: SampledToken) -> list[str | ToolCall]:
        """What has become certain with this token: text and calls, in order; often nothing."""
        if sampled.logprob is not None:
            self._scored.append((sampled, self._written))
        pieces = self._parse(self._decoder.feed(sampled.token))
        special = self._tokenizer.special_name(sampled.token)
        return pieces if special is None else pieces + self._parser.feed(special)

    def finish(self, *, is_cut: bool) -> list[str | ToolCall]:
        """What was held back, now that the reply has ended; ``is_cut`` when the model did not end it itself."""
        return self._parse(self._decoder.flush()) + self._parser.finish(is_cut=is_cut)

    def take_logprobs(self) -> dict[str, Json]:
        """The scores of the tokens since the last call: ``{tokens, token_logprobs, top_logprobs, text_offset}``.

        ``text_offset`` counts the characters that the model had written before the token, calls included. A token that
        is not whole characters reads ``bytes:\\xe2\\x82``, and a special token is its name.
        """
        scored, self._scored = self._scored, []
        return {
            "tokens": [self._name(sampled.token) for sampled, _ in scored],
            "token_logprobs": [sampled.logprob for sampled, _ in scored],
            "top_logprobs": [
                {self._name(token): logprob for token, logprob in sampled.alternatives} for sampled, _ in scored
            ],
            "text_offset": [offset for _, offset in scored],
        }

    def _parse(self, text: str) -> list[str | ToolCall]:
        self._written += len(text)
        return self._parser.feed(text) if text else []

    def _name(self, token: int) -> str:
        special = self._tokenizer.special_name(token)
        if special is not None:
            return str(special)
        piece = self._tokenizer.token_bytes(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

"""The text of a document, by its media type."""

from __future__ import annotations

import codecs
import re
from email.message import Message

from llama_stack.errors import UnreadableDocumentError

TEXT_TYPES = ("text/plain", "text/markdown")


async def extract(content: bytes, mime_type: str) -> str:
    """The text of a document.

    Raises ``UnreadableDocumentError`` for a type that is not read here, and for bytes that are not of their type.
    """
    kind, charset = parse_mime_type(mime_type)
    if kind not in TEXT_TYPES:
        raise UnreadableDocumentError(f"media type {mime_type!r} is not read here; read are: {', '.join(TEXT_TYPES)}")
    return decode(content, charset)


def parse_mime_type(mime_type: str) -> tuple[str, str]:
    """The media type in lower case, and its ``charset``, by default UTF-8 (with or without a byte order mark)."""
    message = Message()
    message["content-type"] = re.sub(r"[\x00-\x1f]", "", mime_type)
    return message.get_content_type() if "/" in mime_type else mime_type.lower(), str(
        message.get_param("charset", "utf-8-sig")
    )


def decode(content: bytes, charset: str) -> str:
    """The bytes as text. Raises ``UnreadableDocumentError``, which says where the first byte is that does not fit."""
    try:
        codec = codecs.lookup(charset)
        if not codec._is_text_encoding:
            raise LookupError
        text = codec.decode(content, "strict")[0]
    except LookupError:
        raise UnreadableDocumentError(f"charset {charset!r} is not known") from None
    except UnicodeDecodeError as error:
        raise UnreadableDocumentError(
            f"it is not {charset.removesuffix('-sig')}: byte {error.start} does not fit"
        ) from None
    if "\0" in text:
        raise UnreadableDocumentError(f"it is not text: character {text.index(chr(0))} is U+0000")
    return text

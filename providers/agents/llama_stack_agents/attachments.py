"""What is attached to messages: texts are read and stand in their places, within one bound for a whole turn."""

from __future__ import annotations

from llama_stack.apis.common import Attachment, Message
from llama_stack.errors import InvalidRequestError
from llama_stack.fetch import Fetcher


class AttachmentReader:
    """Reads the texts that are attached to the messages of one turn, those of earlier turns among them."""

    def __init__(self, fetcher: Fetcher, max_bytes: int) -> None:
        self._fetcher = fetcher
        self._max_bytes = max_bytes
        self._bytes = 0

    async def read(self, message: Message) -> Message:
        """The message with its attached texts in their places; what is attached to it otherwise stays.

        Raises what the fetcher raises, and ``InvalidRequestError`` where all attached texts together are too long.
        """
        items = message.content if isinstance(message.content, list) else [message.content]
        if not any(isinstance(item, Attachment) for item in items):
            return message
        return message.model_copy(update={"content": [await self._read_item(item) for item in items]})

    async def _read_item(self, item: str | Attachment) -> str | Attachment:
        if isinstance(item, str) or not _is_text(item.mime_type):
            return item
        fetched = await self._fetcher.fetch(item.url)
        self._bytes += len(fetched.body)
        if self._bytes > self._max_bytes:
            what = f"the attached texts of this turn hold more than {self._max_bytes} bytes together"
            raise InvalidRequestError(what, param="messages")
        return fetched.body.decode("utf-8", errors="replace")


def _is_text(mime_type: str) -> bool:
    kind = mime_type.partition(";")[0].strip().lower()
    return kind.startswith("text/") or kind in ("application/json", "application/xml", "application/yaml")

"""Services of the web that cannot run in a test, in their published forms: search engines, and an image model.

Each is a handler for ``network.serving``: it knows its paths, checks what it is sent as the service does, and answers
as its documentation has it::

    results = [("A title", "https://a.example/", "Its <strong>text</strong>")]
    async with serving(network, brave_search(key="k", results=results)) as requests:
        ...
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .network import Handler, ok

Results = Sequence[tuple[str, str, str]]
"""Title, URL and text of each."""


def brave_search(*, key: str, results: Results) -> Handler:
    """Brave Search's ``GET /res/v1/web/search`` (api-dashboard.search.brave.com)."""

    def answer(request: _Request) -> bytes:
        if request.method != "GET" or request.path != "/res/v1/web/search":
            return _failed("404 Not Found", {"type": "ErrorResponse"})
        if request.headers.get("x-subscription-token") != key:
            detail = "The provided subscription token is invalid."
            error = {"id": "1", "status": 422, "code": "SUBSCRIPTION_TOKEN_INVALID", "detail": detail}
            return _failed("422 Unprocessable Entity", {"type": "ErrorResponse", "error": error})
        count = int(request.query.get("count", "20"))
        found = [
            {"type": "search_result", "title": title, "url": url, "description": text, "language": "en"}
            for title, url, text in results[:count]
        ]
        whole: dict[str, Any] = {
            "type": "search",
            "query": {"original": request.query["q"]},
            "mixed": {"type": "mixed"},
        }
        return _answered(whole | ({"web": {"type": "search", "results": found}} if found else {}))

    return _handler(answer)


def tavily(*, key: str, results: Results) -> Handler:
    """Tavily's ``POST /search`` (docs.tavily.com)."""

    def answer(request: _Request) -> bytes:
        if request.method != "POST" or request.path != "/search":
            return _failed("404 Not Found", {"detail": "Not Found"})
        if request.headers.get("authorization") != f"Bearer {key}":
            return _failed("401 Unauthorized", {"detail": {"error": "Unauthorized: missing or invalid API key."}})
        asked = json.loads(request.body)
        found = [
            {"title": title, "url": url, "content": text, "score": 0.9, "raw_content": None}
            for title, url, text in results[: asked["max_results"]]
        ]
        whole = {"query": asked["query"], "answer": None, "images": [], "follow_up_questions": None}
        return _answered(whole | {"results": found, "response_time": 0.7, "request_id": "1"})

    return _handler(answer)


def searxng(*, results: Results, formats: Sequence[str] = ("html", "json")) -> Handler:
    """A SearXNG's ``GET /search`` (docs.searxng.org); by default its own settings have ``html`` alone."""

    def answer(request: _Request) -> bytes:
        if request.path != "/search":
            return _failed("404 Not Found", {})
        if request.query.get("format") not in formats:
            return ok(b"<!doctype html><title>403 Forbidden</title>", "content-type: text/html", status="403 Forbidden")
        found = [
            {"url": url, "title": title, "content": text, "engine": "duckduckgo", "template": "default.html",
             "parsed_url": list(urlsplit(url)), "engines": ["duckduckgo"], "positions": [1], "score": 1.0,
             "category": "general", "publishedDate": None}
            for title, url, text in results
        ]  # fmt: skip
        whole = {
            "query": request.query["q"],
            "number_of_results": 0,
            "results": found,
            "answers": [],
            "corrections": [],
        }
        return _answered(whole | {"infoboxes": [], "suggestions": [], "unresponsive_engines": [["google", "timeout"]]})

    return _handler(answer)


def image_model(image: bytes, *, key: str | None = None, url: str | None = None) -> Handler:
    """OpenAI's ``POST /v1/images/generations`` (platform.openai.com, "Create image").

    It answers with base64, or with ``url`` where that is given and asked for.
    """

    def answer(request: _Request) -> bytes:
        if request.method != "POST" or request.path != "/v1/images/generations":
            return _failed("404 Not Found", {"error": {"message": "Not found", "type": "invalid_request_error"}})
        if key is not None and request.headers.get("authorization") != f"Bearer {key}":
            error = {
                "message": "Incorrect API key provided",
                "type": "invalid_request_error",
                "code": "invalid_api_key",
            }
            return _failed("401 Unauthorized", {"error": error})
        asked = json.loads(request.body)
        if not asked.get("prompt"):
            return _failed("400 Bad Request", {"error": {"message": "Missing required parameter: 'prompt'."}})
        is_url = url is not None and asked.get("response_format", "url") == "url"
        one = {"url": url} if is_url else {"b64_json": base64.b64encode(image).decode()}
        return _answered({"created": 1, "data": [one | {"revised_prompt": asked["prompt"]}]})

    return _handler(answer)


class _Request:
    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.method, target, _ = first.split(" ")
        parts = urlsplit(target)
        self.path = parts.path
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _handler(answer: Any) -> Handler:
    async def handler(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(_Request(request)))

    return handler


def _answered(body: Any) -> bytes:
    return ok(json.dumps(body).encode(), "content-type: application/json")


def _failed(status: str, body: Any) -> bytes:
    return ok(json.dumps(body).encode(), "content-type: application/json", status=status)

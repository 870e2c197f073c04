"""Bodies meant to crash, stall or mislead: each gets a 4xx of our shape within a second, and the event loop runs on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import httpx2
import pytest

from tests.server.serving import CHAT_PATH, check_problem

LONGEST_SECONDS = 1.0
LONGEST_LAG_SECONDS = 0.1
TRIES = 3
"""The machine may be busy with other work; a loop that is held by a body is held every time."""

MEGABYTE = 1_000_000
JSON = {"content-type": "application/json"}


def chat(content: bytes = b'"Hi"', more: bytes = b"", message: bytes = b"") -> bytes:
    return b'{"model":"stub","dialog":{"message":{"role":"user","content":%b%b}}%b}' % (content, message, more)


def tool(parameters: bytes) -> bytes:
    return chat(more=b',"available_tools":[{"tool_name":"t","parameters":{"x":%b}}]' % parameters)


def many(item: bytes, count: int) -> bytes:
    return b"[" + b",".join([item] * count) + b"]"


def keys(count: int) -> bytes:
    return b",".join(b'"k%d":0' % number for number in range(count))


def history(messages: bytes) -> bytes:
    return chat().replace(b'"dialog":{', b'"dialog":{"message_history":%b,' % messages)


BAD_MESSAGE = b'{"role":1,"content":1,"tool_calls":1,"tool_responses":1,"a":1,"b":1}'

BODIES: dict[str, Callable[[], bytes]] = {
    # numbers that JSON does not have, or that no later layer carries
    "NaN": lambda: tool(b"NaN"),
    "Infinity": lambda: tool(b"Infinity"),
    "-Infinity": lambda: tool(b"[-Infinity]"),
    "1e999": lambda: tool(b"1e999"),
    "-1e999 as temperature": lambda: chat(more=b',"sampling_params":{"temperature":-1e999}'),
    "a 4,000-digit integer": lambda: tool(b"9" * 4_000),
    "a 10 MB integer": lambda: tool(b"9" * 10 * MEGABYTE),
    "a 65-bit integer": lambda: tool(b"18446744073709551616"),
    "an integer past 63 bits": lambda: chat(more=b',"max_tokens":9223372036854775808'),
    "2**31 tokens": lambda: chat(more=b',"max_tokens":2147483648'),
    "-1 tokens": lambda: chat(more=b',"max_tokens":-1'),
    "a hexadecimal number": lambda: tool(b"0x10"),
    "a leading zero": lambda: tool(b"0123"),
    # text that is not text
    "a lone high surrogate": lambda: chat(b'"\\ud800"'),
    "a lone low surrogate": lambda: chat(b'"\\udc00x"'),
    "surrogates the wrong way round": lambda: chat(b'"\\udc00\\ud800"'),
    "a surrogate in a key": lambda: tool(b'{"\\ud800":1}'),
    "a raw surrogate": lambda: chat(b'"\xed\xa0\x80"'),
    "invalid UTF-8": lambda: chat(b'"\xff\xfe"'),
    "overlong UTF-8": lambda: chat(b'"\xc0\xaf"'),
    "a byte order mark": lambda: b"\xef\xbb\xbf" + chat(),
    "UTF-16": lambda: chat().decode().encode("utf-16"),
    "UTF-16 without a mark": lambda: chat().decode().encode("utf-16-le"),
    "UTF-32": lambda: chat().decode().encode("utf-32"),
    "NUL in an id": lambda: b'{"model":"st\\u0000ub","dialog":{"message":{"role":"user","content":"Hi"}}}',
    "a control character in an id": lambda: tool(b"1").replace(b'"t"', b'"t\\u001b"'),
    "a raw control character": lambda: chat(b'"a\x01b"'),
    "NUL bytes": lambda: b"\0" * 1_000,
    "an endless id": lambda: chat().replace(b'"stub"', b'"' + b"s" * MEGABYTE + b'"'),
    # structure
    "500 lists deep": lambda: tool(b"[" * 500 + b"]" * 500),
    "500 objects deep": lambda: tool(b'{"a":' * 500 + b"1" + b"}" * 500),
    "a million lists deep": lambda: b"[" * MEGABYTE,
    "a million objects deep": lambda: b'{"a":' * MEGABYTE,
    "duplicate keys": lambda: chat(more=b',"model":"other"'),
    "duplicate keys by escape": lambda: chat(more=b',"mod\\u0065l":"other"'),
    "duplicate keys far down": lambda: tool(b'{"a":{"b":1,"c":2,"b":3}}'),
    "a million keys": lambda: tool(b"{" + keys(MEGABYTE) + b"}"),
    "99,000 unknown keys": lambda: chat(more=b"," + keys(99_000)),
    "a million numbers": lambda: tool(many(b"0", MEGABYTE)),
    "a million empty lists": lambda: tool(many(b"[]", MEGABYTE)),
    "20,000 messages": lambda: history(many(b"{}", 20_000)),
    "9,999 wrong messages": lambda: history(many(BAD_MESSAGE, 9_999)),
    "9,999 wrong contents": lambda: chat(many(b"1", 9_999)),
    "16 MB of one string": lambda: chat(b'"' + b"x" * 16 * MEGABYTE + b'"', b',"unknown":1'),
    "16 MB of escapes": lambda: chat(b'"' + b"\\n" * 8 * MEGABYTE, b""),
    "16 MB of quotes": lambda: chat(b'"' + b'\\"' * 8 * MEGABYTE, b""),
    "16 MB of white space": lambda: b" " * 16 * MEGABYTE,
    "16 MB of commas": lambda: b"[" + b"," * 16 * MEGABYTE,
    "100 MB": lambda: b" " * 100 * MEGABYTE,
    # grammar
    "nothing": lambda: b"",
    "truncated": lambda: chat()[:-1],
    "truncated in a string": lambda: chat()[:50],
    "trailing bytes": lambda: chat() + b"x",
    "two values": lambda: chat() * 2,
    "a trailing comma": lambda: chat(more=b","),
    "single quotes": lambda: chat().replace(b'"', b"'"),
    "a comment": lambda: b"/* */" + chat(),
    "not an object": lambda: b'"stub"',
    "a list": lambda: b"[" + chat() + b"]",
    "null": lambda: b"null",
    "null for a field": lambda: chat(more=b',"stream":null'),
    "false for a number": lambda: chat(more=b',"max_tokens":false'),
    "a string for a number": lambda: chat(more=b',"max_tokens":"1"'),
    "a prototype key": lambda: chat(more=b',"__proto__":{"stream":true}'),
    "a class key": lambda: chat(more=b',"__class__":"os"'),
}  # fmt: skip

HEADERS: dict[str, dict[str, str]] = {
    "plain text": {"content-type": "text/plain"},
    "a form": {"content-type": "application/x-www-form-urlencoded"},
    "no content type": {},
    "UTF-16 by name": {"content-type": "application/json; charset=utf-16"},
    "gzip": JSON | {"content-encoding": "gzip"},
    "brotli": JSON | {"content-encoding": "br"},
}


@pytest.fixture(scope="module")
def watched() -> Iterator[httpx2.Client]:
    command = [sys.executable, "-m", "tests.server.watched_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with httpx2.Client(base_url=url, trust_env=False, timeout=60) as client:
            yield client
        process.stdin.close()
        process.stdout.read()
    assert process.returncode == 0


def refused(client: httpx2.Client, body: bytes, headers: dict[str, str]) -> tuple[float, float]:
    """Send a body that must be refused; returns how long that took, and how long the loop was held meanwhile."""
    client.get("/lag")
    began = perf_counter()
    response = client.post(CHAT_PATH, content=body, headers=headers)
    seconds = perf_counter() - began
    lag: float = client.get("/lag").json()
    assert 400 <= response.status_code < 500
    document: dict[str, Any] = json.loads(response.content)
    check_problem(document, response.status_code)
    assert len(response.content) < 20_000
    return seconds, lag


def held_bounds(client: httpx2.Client, body: bytes, headers: dict[str, str]) -> None:
    measured = []
    for _ in range(TRIES):
        measured.append(refused(client, body, headers))
        if measured[-1][0] < LONGEST_SECONDS and measured[-1][1] < LONGEST_LAG_SECONDS:
            return
    assert min(seconds for seconds, _ in measured) < LONGEST_SECONDS
    assert min(lag for _, lag in measured) < LONGEST_LAG_SECONDS


@pytest.mark.parametrize("name", BODIES)
def test_hostile_body_is_refused_in_time(watched: httpx2.Client, name: str) -> None:
    """A 4xx in our shape within a second, and the loop never held for 100 ms: other clients notice nothing."""
    held_bounds(watched, BODIES[name](), JSON)


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_are_refused_in_time(watched: httpx2.Client, name: str) -> None:
    """The body is fine and what is said about it is not."""
    held_bounds(watched, chat(), HEADERS[name])


def test_the_server_is_as_well_as_before(watched: httpx2.Client) -> None:
    """After all of that, a plain request is answered."""
    assert watched.post(CHAT_PATH, content=chat(), headers=JSON).status_code == 200


def test_there_are_enough_of_them() -> None:
    """The number that is promised."""
    assert len(BODIES) + len(HEADERS) >= 60

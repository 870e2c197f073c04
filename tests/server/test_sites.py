"""Hosts and origins: nobody's web page may use the server on this machine."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.server.serving import CHAT, CHAT_PATH, Serving, problem_of, serving

pytestmark = pytest.mark.anyio

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")
FOREIGN_HOSTS = (
    "evil.example",
    "localhost.evil.example",
    "evil.example:8321",
    "127.0.0.1.nip.io",
    "localhost@evil.example",
    "localhost:8321@evil.example",
    "localhost#evil",
    "localhost/evil",
    "localhost?evil",
    "localhost\\evil",
    "localhost.",
    "127.0.0.2",
    "2130706433",
    "0x7f000001",
    "[::2]",
    "[::1%25lo]",
    "localhost:8321:8321",
    "localhost:123456",
    "local host",
    "",
)
FOREIGN_ORIGINS = (
    "http://evil.example",
    "https://localhost.evil.example",
    "http://localhost:3000",
    "http://127.0.0.1:1",
    "null",
    "file://",
    "chrome-extension://abcdef",
    "http://evil.example/http://localhost",
)


@pytest.fixture
async def served() -> AsyncIterator[Serving]:
    async with serving() as found:
        yield found


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://localhost/version", 200),
        ("http://127.0.0.1:8321/version?x=1", 200),
        ("https://localhost/version", 200),
        ("http://localhost", 404),
        ("http://evil.example/version", 421),
        ("http://localhost@evil.example/version", 421),
        ("http://localhost?/version", 421),
        ("http:///version", 421),
    ],
)
async def test_a_target_with_a_host_in_it_is_that_hosts(served: Serving, target: str, status: int) -> None:
    """As clients send it that take this server for a proxy (RFC 9112 section 3.2.2); Host then does not count."""
    client = await served.connect()
    await client.send(f"GET {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    assert (await client.response())[0] == status


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
async def test_foreign_host_is_misdirected_on_every_method(served: Serving, host: str) -> None:
    """DNS rebinding: a page makes its own name point at this machine, and the browser says so in Host."""
    for method in METHODS:
        client = await served.connect()
        await client.send(f"{method} /version HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
        status = int((await client.rest()).split(b" ", 2)[1])
        assert status in (400, 421)  # 400 where the header is no header at all
    assert served.stub.steps == 0


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST", "localhost:8321", "127.0.0.1", "127.0.0.1:80", "[::1]:8321"]
)
async def test_names_of_this_machine_are_answered(served: Serving, host: str) -> None:
    """With any port, for a tunnel or a container may change it."""
    assert (await served.client.get("/version", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
async def test_foreign_origin_is_refused_on_every_method(served: Serving, origin: str) -> None:
    """A deny-list of methods forgets one: DELETE, in a server that others trusted."""
    for method in METHODS:
        response = await served.client.request(method, "/version", headers={"origin": origin})
        assert response.status_code == 403
    assert problem_of(await served.client.post(CHAT_PATH, json=CHAT, headers={"origin": origin}))["status"] == 403
    assert served.stub.steps == 0


async def test_cross_site_navigation_is_refused(served: Serving) -> None:
    """A link or an image on another site sends no Origin, and Sec-Fetch-Site in its place."""
    for method in METHODS:
        response = await served.client.request(method, "/version", headers={"sec-fetch-site": "cross-site"})
        assert response.status_code == 403


@pytest.mark.parametrize("site", ["same-origin", "same-site", "none"])
async def test_own_pages_and_the_address_bar_are_served(served: Serving, site: str) -> None:
    """A person who types the address is no attacker."""
    assert (await served.client.get("/version", headers={"sec-fetch-site": site})).status_code == 200


async def test_page_of_this_server_may_call_it(served: Serving) -> None:
    """Its origin is the host that it asked."""
    response = await served.client.post(CHAT_PATH, json=CHAT, headers={"origin": served.url})
    assert response.status_code == 200


async def test_listed_origin_may_ask_call_and_read() -> None:
    """The browser asks first, then calls, and hands the answer over only if it is named in it (Fetch standard)."""
    async with serving(server={"allowed_origins": ["https://chat.example"]}) as served:
        headers = {"origin": "https://chat.example", "sec-fetch-site": "cross-site"}
        asked = headers | {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        response = await served.client.options(CHAT_PATH, headers=asked)
        assert response.status_code == 204
        assert response.headers["access-control-allow-origin"] == "https://chat.example"
        assert "POST" in response.headers["access-control-allow-methods"]
        assert "content-type" in response.headers["access-control-allow-headers"]
        for body, status in ((CHAT, 200), ({}, 422)):
            response = await served.client.post(CHAT_PATH, json=body, headers=headers)
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == "https://chat.example"
            assert response.headers["vary"] == "origin"
        refused = await served.client.options(CHAT_PATH, headers=asked | {"origin": "https://other.example"})
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers


async def test_listed_hosts_are_answered_and_others_not() -> None:
    """Behind a proxy the clients' names for the server are not its own."""
    async with serving(server={"allowed_hosts": ["llama.example", "fd00::5"]}) as served:
        for host, status in (
            ("llama.example", 200),
            ("LLAMA.example:443", 200),
            ("[fd00::5]", 200),
            ("x.example", 421),
        ):
            assert (await served.client.get("/version", headers={"host": host})).status_code == status


async def test_any_host_is_answered_when_the_operator_says_so() -> None:
    """Something in front may already check names; it has to be said in so many words."""
    async with serving(server={"allowed_hosts": ["*"]}) as served:
        assert (await served.client.get("/version", headers={"host": "any.example"})).status_code == 200


async def test_request_without_host_is_an_old_probe(served: Serving) -> None:
    """HTTP/1.0 knows no Host; load balancers still speak it, and browsers do not."""
    client = await served.connect()
    await client.send(b"GET /health/live HTTP/1.0\r\n\r\n")
    assert (await client.rest()).startswith(b"HTTP/1.1 200")

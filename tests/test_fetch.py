"""The guarded fetcher against URLs that lie and servers that cheat; the honeypot behind it must never be reached."""

from __future__ import annotations

import asyncio
import base64
import gzip
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpcore2
import pytest
from pydantic import ValidationError

from llama_stack.errors import DeadlineExceededError, StackError, UpstreamError, UrlNotAllowedError
from llama_stack.fetch import FetchConfig, Fetched, Fetcher, is_public

if TYPE_CHECKING:
    from httpcore2 import AsyncNetworkStream

pytestmark = pytest.mark.anyio

CERTIFICATE = Path(__file__).with_name("fetch_certificate.pem")
"""For public.example, signed by itself; its key protects nothing but this test."""
PUBLIC = "93.184.216.34"
OTHER = "2606:2800:220:1:248:1893:25c8:1946"
INTERNAL = "10.0.0.5"

Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class Net:
    """A network of names and addresses of its own: public addresses lead to servers of the test, all others nowhere."""

    def __init__(self) -> None:
        self.names: dict[str, list[Sequence[str]]] = {
            "localhost": [["127.0.0.1"]],
            "metadata.google.internal": [["169.254.169.254"]],
            "example.com": [["93.184.215.14"]],
        }
        self.ports: dict[str, int] = {}
        self.honeypot = 0
        """Connections to what should never be connected to."""

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        if host in self.names:
            answers = self.names[host]
            return answers.pop(0) if len(answers) > 1 else answers[0]
        numeric = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        return [str(found[4][0]) for found in numeric]

    async def connect(self, address: str, port: int) -> AsyncNetworkStream:
        if address not in self.ports:
            self.honeypot += not is_public(address)
            raise OSError(f"no server of this test is at {address}")
        return await httpcore2.AnyIOBackend().connect_tcp("127.0.0.1", self.ports[address])


@pytest.fixture
def net() -> Net:
    return Net()


@asynccontextmanager
async def serving(
    net: Net, handler: Handler, *, address: str = PUBLIC, tls: bool = False
) -> AsyncIterator[list[bytes]]:
    """A server at a public address; yields the requests that it was sent."""
    requests: list[bytes] = []
    answers: set[asyncio.Task[None] | None] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers.add(asyncio.current_task())
        with suppress(OSError, asyncio.IncompleteReadError):
            requests.append(await reader.readuntil(b"\r\n\r\n"))
            await handler(requests[-1], writer)
            await writer.drain()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    net.ports[address] = server.sockets[0].getsockname()[1]
    net.names.setdefault("public.example", [[address]])
    try:
        yield requests
    finally:
        await asyncio.gather(*filter(None, answers))
        server.close()
        await server.wait_closed()


def answering(*parts: bytes) -> Handler:
    async def handler(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.writelines(parts)

    return handler


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirect(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Moved\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n".encode()


async def fetched(net: Net, url: str = "http://public.example/page", **config: object) -> Fetched:
    settings = FetchConfig.model_validate({"hosts": ("*",), "timeout_seconds": 20.0} | config)
    fetcher = Fetcher(settings, network=net)
    fetcher._trust = ssl.create_default_context(cafile=CERTIFICATE)
    return await fetcher.fetch(url)


SSRF = [
    "http://127.0.0.1/", "http://localhost/", "http://127.1/", "http://2130706433/", "http://0x7f000001/",
    "http://0177.0.0.1/", "http://0/", "http://0.0.0.0/", "http://[::1]/", "http://[::]/", "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/", "http://[64:ff9b::7f00:1]/", "http://[::127.0.0.1]/", "http://169.254.169.254/",
    "http://[fd00:ec2::254]/", "http://metadata.google.internal/", "http://100.100.100.200/", "http://10.0.0.1/",
    "http://192.168.0.1/", "http://172.16.0.1/", "http://100.64.0.1/", "http://198.18.0.1/",
    "http://example.com@127.0.0.1/", "http://127.0.0.1\\@example.com/", "http://example.com\\@127.0.0.1/",
    "http://example.com#@127.0.0.1/", "http://127.0.0.1%00.example.com/", "http://①②⑦.⓪.⓪.①/",
    "http://127。0。0。1/", "http://LOCALHOST./", "http://[fe80::1%25lo]/", "http://93.184.216.34:6379/",
    "gopher://127.0.0.1/", "ftp://127.0.0.1/", "file:///etc/passwd", "file://localhost/etc/passwd", "FILE:/etc/passwd",
    " http://127.0.0.1/", "http:127.0.0.1", "http:///127.0.0.1", "data:text/plain;base64," + "A" * 400_000,
]  # fmt: skip
"""The 42 of the plan; what matters is the address behind them, never the spelling."""


@pytest.mark.parametrize("url", SSRF, ids=lambda url: url[:40])
async def test_no_url_leads_inside(net: Net, url: str) -> None:
    """With every host allowed, the most that an operator can allow, nothing that is not public is connected."""
    with pytest.raises(StackError) as refused:
        await fetched(net, url, max_bytes=100_000)
    assert isinstance(refused.value, UrlNotAllowedError) or "example.com#" in url
    assert net.honeypot == 0
    assert len(SSRF) == 42


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_to_this_machine_is_not_followed(net: Net, status: int) -> None:
    """A public page is the usual way in: it is judged, and where it points is not."""
    async with serving(net, answering(redirect("http://127.0.0.1/admin", status))):
        with pytest.raises(UrlNotAllowedError, match="not public"):
            await fetched(net)
    assert net.honeypot == 0


async def test_a_redirect_from_https_to_http_is_not_followed(net: Net) -> None:
    """What was asked for in secret must not be sent in the clear."""
    async with serving(net, answering(redirect("http://public.example/")), tls=True) as requests:
        with pytest.raises(UrlNotAllowedError, match="from https to http"):
            await fetched(net, "https://public.example/")
        assert len(requests) == 1


async def test_a_redirect_to_a_file_is_not_followed(net: Net, tmp_path: Path) -> None:
    """Not even to one that the operator allows: the page is not the client."""
    (tmp_path / "note").write_text("secret")
    async with serving(net, answering(redirect(f"file://{tmp_path}/note"))):
        with pytest.raises(UrlNotAllowedError, match="not one that is read"):
            await fetched(net, file_roots=(str(tmp_path),))


async def test_a_chain_of_redirects_ends(net: Net) -> None:
    """Three are followed, the fourth is not."""
    async with serving(net, answering(redirect("/again"))) as requests:
        with pytest.raises(UpstreamError, match="more than 3 times"):
            await fetched(net)
        assert len(requests) == 4


async def test_a_short_chain_of_redirects_is_followed(net: Net) -> None:
    """And the URL in the end is told."""
    steps = iter([redirect("/b?x=1"), redirect("//public.example/c#top"), ok(b"there", "Content-Type: text/HTML; x=y")])

    async def handler(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(next(steps))

    async with serving(net, handler) as requests:
        assert await fetched(net) == Fetched("http://public.example/c", b"there", "text/html")
        assert [request.split()[1] for request in requests] == [b"/page", b"/b?x=1", b"/c"]


async def test_a_name_that_changes_its_mind_is_resolved_once(net: Net) -> None:
    """DNS rebinding: public when it is judged, internal when it is connected."""
    net.names["public.example"] = [[PUBLIC], ["127.0.0.1"]]
    async with serving(net, answering(ok(b"public"))):
        assert (await fetched(net)).body == b"public"
        with pytest.raises(UrlNotAllowedError):
            await fetched(net)
    assert net.honeypot == 0


@pytest.mark.parametrize("addresses", [[PUBLIC, INTERNAL], [INTERNAL, PUBLIC], ["::ffff:10.0.0.5"], []])
async def test_a_name_with_an_inner_address_among_public_ones_is_refused(net: Net, addresses: list[str]) -> None:
    """Which of them is connected would be chance."""
    net.names["public.example"] = [addresses]
    with pytest.raises(UrlNotAllowedError, match="not public"):
        await fetched(net)
    assert net.honeypot == 0


async def test_an_alias_of_an_inner_name_is_refused(net: Net) -> None:
    """A CNAME shows in the addresses alone, and they are what is judged."""
    net.names["alias.example"] = [[INTERNAL]]
    with pytest.raises(UrlNotAllowedError):
        await fetched(net, "http://alias.example/")
    assert net.honeypot == 0


async def test_a_name_with_an_ipv6_address_alone_is_read(net: Net) -> None:
    """Half of the network has no other."""
    net.names["public.example"] = [[OTHER]]
    async with serving(net, answering(ok(b"six")), address=OTHER):
        assert (await fetched(net)).body == b"six"


async def test_the_next_address_is_tried_where_one_does_not_answer(net: Net) -> None:
    """A name with a dead address works in every browser."""
    net.names["public.example"] = [[OTHER, PUBLIC]]
    async with serving(net, answering(ok(b"second"))):
        assert (await fetched(net)).body == b"second"


async def test_a_body_without_end_is_cut_off(net: Net) -> None:
    """It costs its limit and no more."""

    async def handler(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"a" * 65_536)
            await writer.drain()

    async with serving(net, handler):
        with pytest.raises(UpstreamError, match="more than 100000 bytes"):
            await fetched(net, max_bytes=100_000)


async def test_a_body_that_drips_is_given_up(net: Net) -> None:
    """The limit is on the whole, not on the wait for each byte."""

    async def handler(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        while True:
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with serving(net, handler):
        with pytest.raises(DeadlineExceededError, match=r"in 0\.3 s"):
            await fetched(net, timeout_seconds=0.3)


@pytest.mark.parametrize("length", ["10", "99999999999", "5, 6", "-1", "abc"])
async def test_a_content_length_that_lies_is_found_out(net: Net, length: str) -> None:
    """A body that is cut short must not pass for a whole one."""
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n".encode()
    async with serving(net, answering(head, b"short")):
        with pytest.raises(UpstreamError):
            await fetched(net)


async def test_a_connection_that_closes_in_the_middle_is_a_failure(net: Net) -> None:
    """Chunked bodies as well as counted ones."""
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    async with serving(net, answering(head, b"5\r\nhello\r\n")):
        with pytest.raises(UpstreamError):
            await fetched(net)


async def test_a_bomb_is_not_unpacked_beyond_the_limit(net: Net) -> None:
    """Ten megabytes travel as ten kilobytes."""
    bomb = gzip.compress(bytes(10_000_000))
    async with serving(net, answering(ok(bomb, "content-encoding: gzip"))):
        with pytest.raises(UpstreamError, match="more than 1000000 bytes"):
            await fetched(net, max_bytes=1_000_000)


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (gzip.compress(b"x")[:-4], "gzip"),
        (gzip.compress(b"x") + b"more", "gzip"),
        (b"not gzip", "gzip"),
        (b"x", "br"),
        (gzip.compress(gzip.compress(b"x")), "gzip, gzip"),
    ],
)
async def test_packing_that_is_broken_or_was_not_asked_for_is_a_failure(net: Net, body: bytes, encoding: str) -> None:
    """What cannot be unpacked whole is not what the page says."""
    async with serving(net, answering(ok(body, f"content-encoding: {encoding}"))):
        with pytest.raises(UpstreamError):
            await fetched(net)


async def test_a_packed_body_is_unpacked(net: Net) -> None:
    """Most servers pack."""
    async with serving(net, answering(ok(gzip.compress(b"page" * 1000), "content-encoding: GZIP"))):
        assert (await fetched(net)).body == b"page" * 1000


async def test_a_body_that_may_not_fit_the_memory_is_opened_as_a_file(net: Net, tmp_path: Path) -> None:
    """The same bytes as a fetch gives, spooled to a folder in which nothing is left, nor seen meanwhile."""
    body = os.urandom(300_000)
    fetcher = Fetcher(FetchConfig(hosts=("*",), file_roots=(tmp_path,)), network=net)
    async with serving(net, answering(ok(gzip.compress(body), "content-encoding: gzip", "content-type: A/B; c=d"))):
        async with fetcher.open("http://public.example/page", spool=tmp_path) as opened:
            assert (opened.url, opened.media_type) == ("http://public.example/page", "a/b")
            assert os.pread(opened.file.fileno(), 400_000, 0) == opened.file.read() == body
            assert list(tmp_path.iterdir()) == []
        assert opened.file.closed
        with pytest.raises(UpstreamError, match="more than 100000 bytes"):
            async with Fetcher(FetchConfig(hosts=("*",), max_bytes=100_000), network=net).open("http://public.example"):
                raise AssertionError
    async with fetcher.open("data:text/csv,a%0A1", spool=tmp_path) as opened:
        assert (opened.file.read(), opened.media_type) == (b"a\n1", "text/csv")
    (tmp_path / "rows").write_bytes(b"rows")
    async with fetcher.open(f"file://{tmp_path}/rows") as opened:
        assert os.fstat(opened.file.fileno()).st_ino == (tmp_path / "rows").stat().st_ino


async def test_what_may_not_be_fetched_may_not_be_opened(net: Net, tmp_path: Path) -> None:
    """Both ways pass the same judge."""
    (tmp_path / "rows").write_bytes(b"0123456789")
    fetcher = Fetcher(FetchConfig(hosts=("*",), file_roots=(tmp_path,), max_bytes=9), network=net)
    for url in ("http://10.0.0.5/", "file:///etc/passwd", "ftp://x/", f"file://{tmp_path}/rows", "data:,0123456789"):
        with pytest.raises(UrlNotAllowedError):
            async with fetcher.open(url):
                raise AssertionError
    assert net.honeypot == 0


async def test_a_header_of_a_megabyte_is_refused(net: Net) -> None:
    """Headers are held in memory before anybody looks at them."""
    async with serving(net, answering(ok(b"x", "x-long: " + "a" * 1_000_000))):
        with pytest.raises(UpstreamError):
            await fetched(net)


async def test_a_type_that_lies_changes_nothing(net: Net) -> None:
    """The bytes come back as they are; nobody acts on what they are called."""
    async with serving(net, answering(ok(b"\x7fELF", "content-type: image/png"))):
        assert await fetched(net) == Fetched("http://public.example/page", b"\x7fELF", "image/png")


async def test_nothing_of_this_process_goes_along(net: Net, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Proxies, keys and cookies of the environment are not the client's to use; a cookie that was set is not sent."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (tmp_path / ".netrc").write_text("machine public.example login me password canary\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    steps = iter([redirect("/b").replace(b"\r\n\r\n", b"\r\nset-cookie: id=canary\r\n\r\n"), ok(b"done")])

    async def handler(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(next(steps))

    async with serving(net, handler) as requests:
        assert (await fetched(net)).body == b"done"
    assert len(requests) == 2
    sent = b"".join(requests).lower()
    assert b"canary" not in sent
    assert b"cookie" not in sent
    assert b"authorization" not in sent
    assert sent.count(b"host: public.example\r\n") == 2


async def test_a_handshake_that_never_ends_is_given_up(net: Net) -> None:
    """A TLS server that accepts and says nothing."""
    held: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _reader, writer: held.append(writer), "127.0.0.1", 0)
    net.names["public.example"] = [[PUBLIC]]
    net.ports[PUBLIC] = server.sockets[0].getsockname()[1]
    with pytest.raises(DeadlineExceededError):
        await fetched(net, "https://public.example/", timeout_seconds=0.3)
    for writer in held:
        writer.close()
        await writer.wait_closed()
    server.close()
    await server.wait_closed()


async def test_a_certificate_must_be_for_the_name(net: Net) -> None:
    """The address was chosen by us; that it is the right server, only the certificate says."""
    net.names["wrong.example"] = [[PUBLIC]]
    async with serving(net, answering(ok(b"secret")), tls=True):
        assert (await fetched(net, "https://public.example/")).body == b"secret"
        with pytest.raises(UpstreamError):
            await fetched(net, "https://wrong.example/")


@pytest.mark.parametrize(
    "answer", [b"junk\r\n\r\n", b"HTTP/1.1 404 Gone\r\ncontent-length: 0\r\n\r\n", redirect(""), b""]
)
async def test_an_answer_that_is_none_is_the_server_s_failure(net: Net, answer: bytes) -> None:
    """502 and not 500: the fault is theirs."""
    async with serving(net, answering(answer)):
        with pytest.raises(UpstreamError):
            await fetched(net)


async def test_by_default_no_host_is_allowed(net: Net) -> None:
    """Who may be asked is the operator's to say."""
    async with serving(net, answering(ok(b"x"))) as requests:
        for hosts, is_read in (((), False), (("public.example",), True), (("*.example",), True), (("example",), False)):
            if is_read:
                assert (await fetched(net, "http://PUBLIC.example./page", hosts=hosts)).body == b"x"
            else:
                with pytest.raises(UrlNotAllowedError, match=r"host 'public.example' is not among"):
                    await fetched(net, hosts=hosts)
    assert len(requests) == 2


async def test_a_redirect_to_a_host_that_is_not_allowed_is_not_followed(net: Net) -> None:
    """An allowed host must not lend its permission."""
    net.names["other.example"] = [[PUBLIC]]
    async with serving(net, answering(redirect("http://other.example/"))) as requests:
        with pytest.raises(UrlNotAllowedError, match="other.example"):
            await fetched(net, hosts=("public.example",))
        assert len(requests) == 1


@pytest.mark.parametrize(
    ("url", "body", "media_type"),
    [
        ("data:,hello%20you", b"hello you", "text/plain"),
        ("data:text/html,<b>", b"<b>", "text/html"),
        ("data:image/PNG;base64,AAEC", b"\x00\x01\x02", "image/png"),
        ("data:text/plain;charset=utf-8;base64,aGk%3D", b"hi", "text/plain"),
    ],
)
async def test_a_data_url_is_decoded(net: Net, url: str, body: bytes, media_type: str) -> None:
    """RFC 2397."""
    assert await fetched(net, url) == Fetched("data:", body, media_type)


@pytest.mark.parametrize("url", ["data:", "data:text/plain", "data:x;base64,AA", "data:;base64,A", "data:;base64,A A="])
async def test_a_data_url_that_is_none_is_refused(net: Net, url: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(UrlNotAllowedError):
        await fetched(net, url)


async def test_a_data_url_is_bounded(net: Net) -> None:
    """Its cost is its length."""
    body = bytes(1000)
    url = "data:;base64," + base64.b64encode(body).decode()
    assert (await fetched(net, url, max_bytes=1000)).body == body
    with pytest.raises(UrlNotAllowedError, match="more than 999 bytes"):
        await fetched(net, url, max_bytes=999)


async def test_a_file_below_a_root_is_read_and_no_other(net: Net, tmp_path: Path) -> None:
    """By default no file is; a root does not open its neighbours."""
    root, beside = tmp_path / "root", tmp_path / "root-beside"
    for folder in (root / "sub", beside):
        folder.mkdir(parents=True)
        (folder / "a b").write_text("text")
    assert (await fetched(net, f"file://{root}/sub/a%20b", file_roots=(str(root),))).body == b"text"
    for url in (f"file://{beside}/a%20b", f"file://{root}", f"file://{root}/sub", f"file://{root}/none"):
        with pytest.raises(UrlNotAllowedError):
            await fetched(net, url, file_roots=(str(root),))
    with pytest.raises(UrlNotAllowedError, match="not below a folder"):
        await fetched(net, f"file://{root}/sub/a%20b")


@pytest.mark.parametrize(
    "tail",
    ["../secret", "sub/../../secret", "%2e%2e/secret", "..%2fsecret", "sub/%2E%2E/%2e%2e/secret", "./../secret",
     "sub//../../secret", "..\\secret", "%00", "sub/a%00", "secret?x", "%ff%fe", "a" * 9000],
)  # fmt: skip
async def test_no_path_climbs_out_of_its_root(net: Net, tmp_path: Path, tail: str) -> None:
    """Dots, spelt in any way."""
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(UrlNotAllowedError):
        await fetched(net, f"file://{tmp_path}/root/{tail}", file_roots=(str(tmp_path / "root"),))


async def test_links_pipes_and_folders_are_not_read(net: Net, tmp_path: Path) -> None:
    """A link leads out of the root, and a pipe is waited for."""
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("secret")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(root / "pipe")
    for name in ("link", "folder/secret", "pipe"):
        with pytest.raises(UrlNotAllowedError):
            await fetched(net, f"file://{root}/{name}", file_roots=(str(root),))


async def test_a_file_is_bounded(net: Net, tmp_path: Path) -> None:
    """Also one that claims to be empty and never ends, were it not refused for what it is."""
    (tmp_path / "big").write_bytes(bytes(1001))
    with pytest.raises(UrlNotAllowedError, match="more than 1000 bytes"):
        await fetched(net, f"file://{tmp_path}/big", file_roots=(str(tmp_path),), max_bytes=1000)
    with pytest.raises(UrlNotAllowedError):
        await fetched(net, "file:///dev/zero", file_roots=("/dev",))


@pytest.mark.parametrize("host", ["Example.com", "http://example.com", "exa mple", "*.*", "a.*.example", ""])
def test_a_host_that_matches_nothing_is_refused_in_the_settings(host: str) -> None:
    """A pattern that never matches would look like a permission."""
    with pytest.raises(ValidationError):
        FetchConfig(hosts=(host,))


@pytest.mark.parametrize(
    ("address", "is_on_it"),
    [(PUBLIC, True), (OTHER, True), ("8.8.8.8", True), ("224.0.0.1", False), ("240.0.0.1", False), ("ff02::1", False),
     ("255.255.255.255", False), ("2002:7f00:1::", False), ("2001:0:7f00:1::", False), ("fec0::1", False),
     ("64:ff9b:1::1", False), ("192.0.2.1", False), ("fe80::1%lo", False), ("junk", False)],
)  # fmt: skip
def test_what_is_public(address: str, is_on_it: bool) -> None:
    """Translated addresses stand for others, and the library that knows the registries does not know that."""
    assert is_public(address) == is_on_it


def test_nobody_else_follows_a_url() -> None:
    """One place to guard: other HTTP clients have an operator's address, the stack's client and that of MCP servers."""
    import ast

    root = Path(__file__).resolve().parents[1]
    clients = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "aiohttp", "urllib3"}
    found: set[str] = set()
    for folder in ("llama_stack", "providers"):
        for file in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                if any(name.partition(".")[0] in clients or name == "urllib.request" for name in names):
                    found.add(str(file.relative_to(root)))
    mcp = "providers/agents/llama_stack_agents/tools/mcp.py"
    assert found == {"llama_stack/fetch.py", "llama_stack/client/connection.py", mcp}

"""Documents of every type that is read, and of every kind of harm; the extractor outlives them all."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from llama_stack_memory.config import DocumentLimits
from llama_stack_memory.extraction import Extractor

from llama_stack.errors import UnreadableDocumentError
from tests.providers.memory.extraction.files import BOMBS, GOOD, changed, malformed, pdf, pdf_page, stream, text_pdf

pytestmark = pytest.mark.anyio

LIMITS = DocumentLimits(seconds=4, memory_bytes=300_000_000, pages=500)


@pytest.fixture
async def extractor() -> AsyncIterator[Extractor]:
    async with Extractor.started(LIMITS) as started:
        yield started


@pytest.mark.parametrize(
    ("mime_type", "content", "text"),
    [
        ("text/plain", "Snø\r\nfaller".encode(), "Snø\r\nfaller"),
        ("text/plain; charset=latin-1", "Snø".encode("latin-1"), "Snø"),
        ('Text/Plain;charset="UTF-16"', "Snø".encode("utf-16"), "Snø"),
        ("text/markdown", b"\xef\xbb\xbf# Snow\n\nfalls", "# Snow\n\nfalls"),
        (
            "text/html",
            b"<title>Oslo</title><style>p {}</style><script>x()</script><p>It is <b>the</b> cap<i>ital</i>"
            b"<ul><li>snow<li>rain</ul>and&nbsp;more &amp; more<br>end<!-- not seen -->",
            "Oslo\nIt is the capital\nsnow\nrain\nand more & more\nend\n",
        ),
        ("text/html", "<meta charset='iso-8859-1'><p>Snø".encode("latin-1"), "Snø\n"),
        ("application/xhtml+xml", b"<html><body><p>Snow</p></body></html>", "Snow\n"),
        ("application/pdf", text_pdf("Oslo is the capital.", "Snow falls."), "Oslo is the capital.\nSnow falls.\n\n"),
        (
            "application/json",
            b'{"city": "Oslo", "facts": [{"snow": true}, 1.5, null, "a"], "none": {}}',
            "city: Oslo\nfacts[0].snow: true\nfacts[1]: 1.5\nfacts[2]: null\nfacts[3]: a\n",
        ),
        ("application/json", b'"alone"', "alone\n"),
        ("application/json; charset=utf-8", b'\xef\xbb\xbf["marked"]', "[0]: marked\n"),
        ("text/csv; charset=UTF8", b"\xef\xbb\xbfcity\nOslo\n", "city: Oslo. \n"),
        ("text/plain; charset=utf-8", b"\xef\xbb\xbfSnow", "Snow"),
        ("text/plain; charset*=latin-1''iso-8859-1", "Snø".encode("latin-1"), "Snø"),
        ("text/html", "<meta charset='utf-16'><p>Snø".encode(), "Snø\n"),
        ("text/html", b"\xef\xbb\xbf" + "<meta charset='latin-1'><p>Snø".encode(), "Snø\n"),
        ("text/html", "\ufeff<p>Snø".encode("utf-16-le"), "Snø\n"),
        ("application/json", b'{"a": "one\\u0000two"}', "a: onetwo\n"),
        ("text/csv", b'city,note\nOslo,"a ""b"", c"\n\nRome,\n', 'city: Oslo. note: a "b", c. \ncity: Rome. \n'),
        ("text/csv", b"", ""),
    ],
)
async def test_documents_become_text(extractor: Extractor, mime_type: str, content: bytes, text: str) -> None:
    """What people see of them, line by line."""
    assert await extractor.extract(content, mime_type) == text


@pytest.mark.parametrize(
    ("mime_type", "content", "reason"),
    [
        ("image/png", b"\x89PNG", "media type 'image/png' is not read here; these are: text/plain, "),
        ("nonsense", b"x", "media type 'nonsense'"),
        ("text/plain;\r\n x=1", b"x", "holds a control character"),
        ("application/json", b'"\\ud800"', "it is no valid application/json"),
        ("text/plain", b"a\xff", "it is not utf-8: byte 1 does not fit"),
        ("text/plain", b"a\0b", "character 1 is U\\+0000"),
        ("text/plain; charset=klingon", b"a", "charset 'klingon' is not known"),
        ("text/plain; charset=base64", b"a", "charset 'base64' is not one of texts"),
        ("application/json", b'{"a": NaN}', "NaN is not JSON"),
        ("application/json", b"{'a': 1}", "it is no valid application/json: Expecting property name"),
        ("application/json", b"", "it is no valid application/json"),
        ("text/csv", b"a,b\n1,2\n1,2,3\n", "row 3 has 3 cells, and the first one has 2"),
        ("text/csv", b'a,b\n1,"2', "it is no valid text/csv: unexpected end of data"),
        ("text/html", b"<script>only()</script>", "there is no text in it"),
        ("application/pdf", pdf_page(stream(b"")), "there is no text in it"),
        ("application/pdf", b"not a PDF at all", "it is no valid application/pdf"),
        ("application/pdf", text_pdf("Oslo")[:200], "it is no valid application/pdf"),
        ("application/pdf", b"", "it is no valid application/pdf"),
        (
            "application/pdf",
            pdf(
                b"<< /Type /Catalog /Pages 2 0 R >>",
                b"<< /Type /Pages /Kids [%s] /Count 501 >>" % (b"3 0 R " * 501),
                b"<< /Type /Page /Parent 2 0 R /Resources << >> >>",
            ),
            "it has more than 500 pages",
        ),
    ],
)
async def test_what_cannot_be_read_says_why(extractor: Extractor, mime_type: str, content: bytes, reason: str) -> None:
    """An empty text in its place would be a document that nobody finds, and nobody knows why."""
    with pytest.raises(UnreadableDocumentError, match=reason):
        await extractor.extract(content, mime_type)


def peak_bytes_of(extractor: Extractor) -> int:
    """The most address space that the child has had; 0 where there is none."""
    process = extractor._process
    if process is None:
        return 0
    with open(f"/proc/{process.pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmPeak"))


@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb_is_an_error_of_its_own_or_harmless(extractor: Extractor, name: str) -> None:
    """A typed error or a text within the limits, and the next document is read as if nothing had been."""
    mime_type, content = BOMBS[name]()
    assert len(content) < 1_300_000
    with suppress(UnreadableDocumentError):
        text = await extractor.extract(content, mime_type)
        assert len(text) <= max(1_000_000, LIMITS.ratio * len(content))
    assert peak_bytes_of(extractor) <= LIMITS.memory_bytes
    assert "capital" in await extractor.extract(GOOD["text/html"], "text/html")


async def test_a_hundred_malformed_documents_are_refused(extractor: Extractor) -> None:
    """Each with a reason, and by one and the same process, which none of them brings down."""
    documents = malformed()
    assert len(documents) >= 100
    for mime_type, content in documents:
        with pytest.raises(UnreadableDocumentError):
            print(mime_type, content, await extractor.extract(content, mime_type))
    assert "capital" in await extractor.extract(GOOD["application/pdf"], "application/pdf")


async def test_changed_documents_are_refused_or_read(extractor: Extractor) -> None:
    """Whatever of them is still readable is text; nothing else comes out than that and a reason."""
    refused = 0
    for mime_type, content in changed(100):
        try:
            await extractor.extract(content, mime_type)
        except UnreadableDocumentError:
            refused += 1
    assert 30 < refused < 100
    assert "capital" in await extractor.extract(GOOD["application/pdf"], "application/pdf")


def test_there_are_fifty_bombs() -> None:
    """As many as were promised."""
    assert len(BOMBS) >= 50


async def test_a_parser_that_dies_costs_only_its_document(extractor: Extractor) -> None:
    """As by a fault in a library that is written in C, or when the system kills it for memory."""
    await extractor.extract(GOOD["text/html"], "text/html")
    process = extractor._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    with pytest.raises(UnreadableDocumentError, match="crashed"):
        await extractor.extract(GOOD["text/html"], "text/html")
    assert "capital" in await extractor.extract(GOOD["text/html"], "text/html")


async def test_a_request_that_is_cancelled_ends_the_work(extractor: Extractor) -> None:
    """Its client has left, and the next one must not get its answer."""
    mime_type, content = BOMBS["PDF: forms that draw a billion"]()
    reading = asyncio.create_task(extractor.extract(content, mime_type))
    while extractor._process is None:
        await asyncio.sleep(0.01)
    process = extractor._process
    await asyncio.sleep(0.05)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert process.returncode is not None
    assert "capital" in await extractor.extract(GOOD["text/html"], "text/html")


async def test_a_process_without_a_parent_ends_its_work(tmp_path: Path) -> None:
    """Where the server was killed, nobody is left to stop a document that takes for ever."""
    bomb = tmp_path / "bomb"
    bomb.write_bytes(BOMBS["a tag with 100,000 attributes"]()[1] * 8)  # minutes, if it is let
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, str(bomb), stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    await asyncio.sleep(0.3)
    parent.kill()
    await parent.wait()
    async with asyncio.timeout(20):
        while await asyncio.to_thread(is_running, child):
            await asyncio.sleep(0.05)


PARENT = """
import asyncio, sys
from pathlib import Path
from llama_stack_memory.config import DocumentLimits
from llama_stack_memory.extraction import Extractor

async def main():
    async with Extractor.started(DocumentLimits(seconds=1)) as extractor:
        await extractor.extract(b"<p>x", "text/html")
        print(extractor._process.pid, flush=True)
        await extractor.extract(Path(sys.argv[1]).read_bytes(), "text/html")

asyncio.run(main())
"""


def is_running(process: int) -> bool:
    """Whether it does anything; one that has ended may wait for somebody to ask how."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_its_process_ends_with_it() -> None:
    """Nothing is left behind when the stack stops."""
    async with Extractor.started(LIMITS) as extractor:
        await extractor.extract(GOOD["text/csv"], "text/csv")
        process = extractor._process
    assert process is not None
    assert process.returncode is not None

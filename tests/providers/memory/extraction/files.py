"""Documents for the tests of extraction, good and hostile, made on the spot and none of them larger than a megabyte."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial

Bomb = Callable[[], tuple[str, bytes]]


def stream(content: bytes, entries: bytes = b"") -> bytes:
    return b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(content), entries, content)


def pdf(*objects: bytes, root: bytes = b"1 0 R", trailer: bytes = b"") -> bytes:
    """A PDF of these objects, numbered from 1, with a table of where they are."""
    body, places = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    table += b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer\n<< /Size %d /Root %s %s >>\nstartxref\n%d\n%%%%EOF\n"
    return body + table + end % (len(objects) + 1, root, trailer, len(body))


FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"


def pdf_page(content: bytes, resources: bytes = b"/Font << /F1 5 0 R >>", *more: bytes) -> bytes:
    """A PDF of one page whose content is the object ``content``; more objects are numbered from 6."""
    return pdf(
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R /Resources << %s >> >>" % resources,
        content,
        FONT,
        *more,
    )


def text_pdf(*lines: str) -> bytes:
    """A PDF that shows these lines."""
    shown = b" ".join(b"(%s) Tj 0 -20 Td" % line.encode("latin-1") for line in lines)
    return pdf_page(stream(zlib.compress(b"BT /F1 12 Tf 50 700 Td " + shown + b" ET"), b"/Filter /FlateDecode"))


def packed(megabytes: int, unit: bytes = b"\0") -> bytes:
    """A zlib stream that unpacks to so much; at most a thousandth of it."""
    packer = zlib.compressobj(9)
    block = unit * (1_000_000 // len(unit))
    return b"".join([*(packer.compress(block) for _ in range(megabytes)), packer.flush()])


def _nested_forms(depth: int, width: int) -> bytes:
    """Each form draws the next one several times: width ** depth of them in all."""
    forms = []
    for n in range(depth):
        draw = b"/X Do " * width if n < depth - 1 else b"BT /F1 12 Tf (lol) Tj ET"
        resources = b"<< /XObject << /X %d 0 R >> /Font << /F1 5 0 R >> >>" % (7 + n)
        forms.append(stream(draw, b"/Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources %s" % resources))
    return pdf_page(stream(b"/X Do"), b"/XObject << /X 6 0 R >>", *forms)


def _filters(count: int) -> bytes:
    data = packed(100)
    for _ in range(count - 1):
        data = zlib.compress(data, 9)
    return pdf_page(stream(data, b"/Filter [%s]" % (b" /FlateDecode" * count)))


def _wide_map() -> bytes:
    ranges = b"".join(b"<0000> <ffff> <%04x>\n" % n for n in range(400))
    cmap = b"begincmap 400 beginbfrange\n" + ranges + b"endbfrange endcmap"
    font = b"<< /Type /Font /Subtype /Type0 /BaseFont /F /Encoding /Identity-H /ToUnicode 7 0 R >>"
    return pdf_page(stream(b"BT /F2 9 Tf <0041> Tj ET"), b"/Font << /F2 6 0 R >>", font, stream(cmap))


CATALOG, PAGES = b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [%s] /Count %d >>"
SHOW = b"BT /F1 9 Tf "

PDF_BOMBS: dict[str, Callable[[], bytes]] = {
    "content of 800 MB": lambda: pdf_page(stream(packed(800), b"/Filter /FlateDecode")),
    "content of 100 MB that shows text": lambda: pdf_page(
        stream(packed(100, b"BT /F1 9 Tf (aaaaaaaaaaaaaaaaaaaaaaaa) Tj ET "), b"/Filter /FlateDecode")
    ),
    "filters within filters": lambda: _filters(5),
    "a hundred filters": lambda: _filters(100),
    "a thousand pages of one bomb": lambda: pdf(
        CATALOG,
        PAGES % (b"3 0 R " * 1000, 1000),
        b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /Resources << >> >>",
        stream(packed(50), b"/Filter /FlateDecode"),
    ),
    "many contents that are one bomb": lambda: pdf(
        CATALOG,
        PAGES % (b"3 0 R", 1),
        b"<< /Type /Page /Parent 2 0 R /Contents [%s] /Resources << >> >>" % (b"4 0 R " * 2000),
        stream(packed(20), b"/Filter /FlateDecode"),
    ),
    "forms that draw a billion": lambda: _nested_forms(9, 10),
    "a form that draws itself": lambda: pdf_page(
        stream(b"/X Do"),
        b"/XObject << /X 6 0 R >>",
        stream(
            b"/X Do /X Do", b"/Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources << /XObject << /X 6 0 R >> >>"
        ),
    ),
    "pages that are their own parents": lambda: pdf(CATALOG, b"<< /Type /Pages /Kids [2 0 R] /Count 1 >>"),
    "pages in a circle": lambda: pdf(CATALOG, PAGES % (b"3 0 R", 9), b"<< /Type /Pages /Kids [2 0 R] /Parent 2 0 R >>"),
    "a tree of pages that doubles": lambda: pdf(
        CATALOG, *(b"<< /Type /Pages /Kids [%d 0 R %d 0 R] /Count 9 >>" % (n, n) for n in range(3, 40))
    ),
    "a count of pages that is a lie": lambda: pdf(CATALOG, PAGES % (b"", 2_000_000_000)),
    "twenty thousand pages": lambda: pdf(
        CATALOG, PAGES % (b"3 0 R " * 20_000, 20_000), b"<< /Type /Page /Parent 2 0 R /Resources << >> >>"
    ),
    "a million operators": lambda: pdf_page(
        stream(zlib.compress(b"q 1 0 0 1 1 1 cm Q " * 1_000_000, 9), b"/Filter /FlateDecode")
    ),
    "a million characters one by one": lambda: pdf_page(
        stream(zlib.compress(SHOW + b"(a) Tj 1 0 Td " * 1_000_000 + b" ET", 9), b"/Filter /FlateDecode")
    ),
    "saves of state without end": lambda: pdf_page(
        stream(zlib.compress(b"q " * 5_000_000, 9), b"/Filter /FlateDecode")
    ),
    "a table of letters that is all of them 400 times": _wide_map,
    "an array within arrays": lambda: pdf_page(stream(SHOW + b"[" * 300_000 + b"]" * 300_000 + b" TJ ET")),
    "dictionaries within dictionaries": lambda: pdf(b"<< /A " * 100_000 + b">>" * 100_000),
    "a trailer that comes before itself": lambda: pdf(CATALOG, PAGES % (b"", 0), trailer=b"/Prev 9"),
    "an object that is a reference to itself": lambda: pdf(b"1 0 R"),
    "references in a long chain": lambda: pdf(*(b"%d 0 R" % n for n in range(2, 5_000)), CATALOG),
    "a length of its own length": lambda: pdf(b"<< /Length 1 0 R >>\nstream\nx\nendstream"),
    "a length of terabytes": lambda: pdf_page(b"<< /Length 9999999999999 >>\nstream\nx\nendstream"),
    "run lengths": lambda: pdf_page(stream(b"\x81a" * 300_000, b"/Filter /RunLengthDecode")),
    "an LZW bomb": lambda: pdf_page(stream(bytes(range(256)) * 2000, b"/Filter /LZWDecode")),
    "hexadecimal without end": lambda: pdf_page(stream(b"41" * 400_000, b"/Filter /ASCIIHexDecode")),
    "a predictor with columns of gigabytes": lambda: pdf_page(
        stream(packed(10), b"/Filter /FlateDecode /DecodeParms << /Predictor 15 /Columns 2000000000 >>")
    ),
    "an encryption of a billion rounds": lambda: pdf(
        CATALOG,
        PAGES % (b"", 0),
        b"<< /Filter /Standard /V 5 /R 6 /Length 256 /P -1 /O <%s> /U <%s> /OE <%s> /UE <%s> /Perms <%s> >>"
        % (b"00" * 48, b"00" * 48, b"00" * 32, b"00" * 32, b"00" * 16),
        trailer=b"/Encrypt 3 0 R /ID [<00> <00>]",
    ),
    "a table of objects of a million": lambda: b"%PDF-1.7\nxref\n0 2000000000\n" + b"0000000000 65535 f \n" * 40_000,
    "a name without end": lambda: pdf(b"<< /" + b"A" * 900_000 + b" 1 >>"),
    "a number without end": lambda: pdf(b"<< /A " + b"9" * 900_000 + b" >>"),
    "only the beginnings of objects": lambda: b"%PDF-1.7\n" + b"1 0 obj\n" * 100_000,
}

OTHER_BOMBS: dict[str, Bomb] = {
    "divisions within divisions": lambda: ("text/html", b"<div>" * 180_000),
    "tables within tables": lambda: ("text/html", b"<table><tr><td>" * 60_000),
    "bold within italics": lambda: ("text/html", b"<b><i>" * 150_000 + b"x"),
    "formatting that is never closed": lambda: ("text/html", b"<p><a href=x><b><font>" * 40_000),
    "a tag with 100,000 attributes": lambda: (
        "text/html",
        b"<p " + b" ".join(b"a%d=1" % n for n in range(100_000)) + b">x",
    ),
    "300,000 line breaks": lambda: ("text/html", b"<br>" * 240_000 + b"x"),
    "a charset that decompresses": lambda: ("text/plain; charset=zlib", packed(500)),
    "a charset that takes quadratic time": lambda: ("text/html; charset=punycode", b"a-" * 300_000),
    "a charset of the page's own": lambda: ("text/html", b"<meta charset=bz2>" + b"x" * 1000),
    "lists within lists": lambda: ("application/json", b"[" * 900_000 + b"]" * 900_00),
    "objects within objects": lambda: ("application/json", b'{"a":' * 150_000 + b"1" + b"}" * 150_000),
    "a number of a million digits": lambda: ("application/json", b"9" * 900_000),
    "a path that is said again for each value": lambda: (
        "application/json",
        b'{"%s": [%s]}' % (b"k" * 300_000, b",".join([b"1"] * 200_000)),
    ),
    "500,000 empty lists": lambda: ("application/json", b"[" + b",".join([b"[]"] * 300_000) + b"]"),
    "a column name that is said again in each row": lambda: ("text/csv", b"c" * 300_000 + b"\n" + b"1\n" * 200_000),
    "a cell that never ends": lambda: ("text/csv", b'a,b\n1,"' + b"x" * 900_000),
    "a million columns": lambda: ("text/csv", b"," * 400_000 + b"\n" + b"," * 400_000),
}


def _as_pdf(make: Callable[[], bytes]) -> tuple[str, bytes]:
    return "application/pdf", make()


BOMBS: dict[str, Bomb] = {
    **{f"PDF: {name}": partial(_as_pdf, make) for name, make in PDF_BOMBS.items()},
    **OTHER_BOMBS,
}

GOOD: dict[str, bytes] = {
    "application/pdf": text_pdf("Oslo is the capital.", "Snow falls."),
    "text/html": b"<!doctype html><title>Oslo</title><body><p>It is the <b>capital</b>.</body>",
    "application/json": '{"city": "Oslo", "facts": [{"snow": true}, 1.5, null, "æ"]}'.encode(),
    "text/csv": 'city,snow\nOslo,yes\n"Ålesund, west",no\n'.encode(),
    "text/plain": "Oslo is the capital, og snø faller. ".encode() * 3,
}


def _cut(content: bytes, count: int, most: float = 1.0) -> list[bytes]:
    """The content cut off at ``count`` places, all within that part of it."""
    return [content[: int(len(content) * most * n / count)] for n in range(1, count)]


def _with(content: bytes, wrong: bytes, count: int) -> list[bytes]:
    """The content with ``wrong`` put in at ``count`` places, one a time."""
    return [content[:at] + wrong + content[at:] for at in (len(content) * n // count for n in range(count))]


def malformed() -> list[tuple[str, bytes]]:
    """Documents that are not what their media type says, whichever way one looks at them."""
    ogg, gif, packed_text = b"OggS\0\2" + bytes(range(256)), b"GIF89a\xff\xfe\0", zlib.compress(b"Oslo" * 99)
    of_kinds: dict[str, list[bytes]] = {
        "text/plain": [*_with(GOOD["text/plain"], b"\xff", 6), *_with(GOOD["text/plain"], b"\0", 4), ogg, packed_text],
        "text/markdown": [*_with(b"# Oslo\n\nSnow falls.", b"\xc3", 6), gif],
        "text/html": [*_with(GOOD["text/html"], b"\xe9", 6), *_with(GOOD["text/html"], b"\0", 3), ogg],
        "application/json": [
            *_cut(GOOD["application/json"], 21),
            *_with(GOOD["application/json"], b"\xfe", 4),
            *(
                b"{a: 1}",
                b"{'a': 1}",
                b"[1,]",
                b"[1 2]",
                b'{"a" 1}',
                b"[NaN]",
                b"[-Infinity]",
                b"[01]",
                b"nul",
                b"// a",
            ),
            *(b'"\\x41"', b'"a\nb"', b'["\\ud800"]', b"{}{}", b"", b"[1]]"),
        ],
        "text/csv": [
            *(b"a,b\n" + b"1,2\n" * n + row for n in (0, 3) for row in (b"1\n", b"1,2,3\n", b'1,"2', b'1,"2"x\n')),
            *_with(GOOD["text/csv"], b"\xff", 4),
        ],
        "application/pdf": [
            *_cut(GOOD["application/pdf"], 16, most=0.5),
            *(b"", b"%PDF-1.7\n", gif, b"%PDF-1.7\n%%EOF", pdf(b"<< /Type /Catalog >>"), pdf(CATALOG, b"null")),
            pdf(CATALOG, PAGES % (b"", 0)),
        ],
    }
    return [(kind, content) for kind, contents in of_kinds.items() for content in contents]


def changed(count: int) -> Iterator[tuple[str, bytes]]:
    """Good documents with bytes changed, cut out, doubled or cut off; always the same ones."""
    import random

    chance = random.Random(20)
    kinds = list(GOOD)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        content = bytearray(GOOD[kind])
        for _ in range(chance.randint(1, 6)):
            if not content:
                break
            at = chance.randrange(len(content))
            match chance.randrange(4):
                case 0:
                    content[at] = chance.randrange(256)
                case 1:
                    del content[at : at + chance.randint(1, 20)]
                case 2:
                    content[at:at] = content[at : at + 30]
                case 3:
                    del content[max(at, 1) :]
        yield kind, bytes(content)

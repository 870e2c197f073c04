"""The provider of datasets keeps the contract; and files that are hostile, broken or larger than memory."""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from llama_stack_data import DatasetsConfig
from llama_stack_data.config import RowLimits
from llama_stack_data.datasets.content import Content, form_of, stored_url
from llama_stack_data.datasets.provider import DatasetsProvider
from llama_stack_data.datasets.rows import Form, RowReader
from llama_stack_data.datasets.store import DatasetStore
from llama_stack_data.plugin import start_datasets

from llama_stack.apis import Datasets
from llama_stack.apis.datasets import (
    ColumnKind,
    CreateDatasetRequest,
    Dataset,
    ReadDatasetRequest,
    StoreDatasetRequest,
)
from llama_stack.errors import (
    BlobCorruptError,
    InvalidRequestError,
    OverloadedError,
    UnreadableDocumentError,
    UrlNotAllowedError,
)
from llama_stack.fetch import FetchConfig, Fetcher
from llama_stack.storage import open_store
from llama_stack.testing.network import StagedNetwork as Net
from llama_stack.testing.network import answering, ok, serving
from tests.providers.data.dataset_rules import MESSAGES, UNICODE, DatasetRules, ids_of, rows_of

pytestmark = pytest.mark.anyio

DIALOG, TEXT, MEDIA, NUMBER, JSON = ColumnKind


@asynccontextmanager
async def opened(folder: Path, config: DatasetsConfig, url: str = "sqlite") -> AsyncIterator[Datasets]:
    async with open_store(url, folder) as store:
        owner = "datasets.datasets"
        async with start_datasets(config, store.database(owner), store.blobs(owner)) as datasets:
            yield datasets


class TestDatasets(DatasetRules):
    """Everything that any provider must keep to."""

    @asynccontextmanager
    async def open(self, folder: Path) -> AsyncIterator[Datasets]:
        async with opened(folder, DatasetsConfig()) as datasets:
            yield datasets


class TestDatasetsInPostgresql(DatasetRules):
    """The same where several machines share one state."""

    @pytest.fixture(autouse=True)
    def _url(self, postgresql_schema_url: str) -> None:
        self.url = postgresql_schema_url

    @asynccontextmanager
    async def open(self, folder: Path) -> AsyncIterator[Datasets]:
        async with opened(folder, DatasetsConfig(), self.url) as datasets:
            yield datasets


class Files:
    """Files in a folder that may be read from."""

    def __init__(self, datasets: Datasets, folder: Path) -> None:
        self.datasets = datasets
        self.folder = folder

    def dataset(self, name: str, content: bytes, **columns: ColumnKind) -> Dataset:
        (self.folder / name).write_bytes(content)
        return Dataset(columns=columns, content_url=f"file://{self.folder}/{name}", metadata={})

    async def read(self, name: str, content: bytes | str, **columns: ColumnKind) -> list[dict[str, Any]]:
        content = content.encode() if isinstance(content, str) else content
        return await rows_of(self.datasets, self.dataset(name, content, **columns))

    async def again(self, name: str, columns: Mapping[str, ColumnKind], **span: int) -> list[dict[str, Any]]:
        url = f"file://{self.folder}/{name}"
        return await rows_of(self.datasets, Dataset(columns=dict(columns), content_url=url, metadata={}), **span)

    async def refused(self, name: str, content: bytes | str, **columns: ColumnKind) -> InvalidRequestError:
        with pytest.raises(InvalidRequestError) as error:
            await self.read(name, content, **columns)
        return error.value


LIMITS = RowLimits(row_bytes=100_000, seconds=30, memory_bytes=256 * 1024 * 1024, ratio=10)


@pytest.fixture
async def files(tmp_path: Path) -> AsyncIterator[Files]:
    folder = tmp_path / "files"
    folder.mkdir()
    config = DatasetsConfig.read({"fetch": {"file_roots": [str(folder)]}, "rows": LIMITS.model_dump()})
    async with opened(tmp_path / "state", config) as datasets:
        yield Files(datasets, folder)


def test_what_is_not_said_of_urls_is_as_the_page_tells() -> None:
    """Setting one of the fetcher's limits must not bring back the fetcher's own defaults for the others."""
    read = DatasetsConfig.read({"fetch": {"file_roots": ["/srv"]}}).fetch
    assert (read.max_bytes, read.timeout_seconds, read.hosts) == (4 * 1024**3, 600, ())
    assert DatasetsConfig().fetch == DatasetsConfig.read({"fetch": {}}).fetch


@pytest.mark.parametrize(
    ("url", "media_type", "form"),
    [
        ("file:///a/b.jsonl", None, Form.JSONL),
        ("https://example.com/b.NDJSON?x=.csv#y.parquet", "text/html", Form.JSONL),
        ("https://example.com/rows%2Ecsv", None, Form.CSV),
        ("https://example.com/rows", "text/csv", Form.CSV),
        ("https://example.com/rows.parquet", None, Form.PARQUET),
        ("data:application/x-ndjson,a.csv", "application/x-ndjson", Form.JSONL),
    ],
)
def test_the_name_says_how_rows_are_written_or_else_the_source(url: str, media_type: str | None, form: Form) -> None:
    """Servers call anything ``text/plain``; a name was given by somebody who knew."""
    assert form_of(url, media_type) is form


@pytest.mark.parametrize(
    ("url", "media_type"),
    [("file:///a/b.json", None), ("data:,x.csv", "text/plain"), ("https://e.com/a.jsonl.gz", "application/gzip")],
)
def test_what_is_not_read_here_is_named_with_what_is(url: str, media_type: str | None) -> None:
    """Nothing is guessed from the bytes."""
    with pytest.raises(UnreadableDocumentError, match=r"\.jsonl.*text/csv"):
        form_of(url, media_type)


async def test_json_lines_as_people_write_them(files: Files) -> None:
    """A byte order mark, Windows line ends, blank lines, no newline at the end."""
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n  {"a": 2}  \n\n{"a": 3}'
    assert await files.read("a.jsonl", content, a=NUMBER) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert await files.again("a.jsonl", {"a": NUMBER}, offset=1, limit=1) == [{"a": 2}]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"t": "a"', "no valid JSON"),
        (b'{"t": "a"} {"t": "b"}', "no valid JSON"),
        (b'{"t": "caf\xe9"}', "not UTF-8: its byte 10"),
        (b'{"t": "a\0"}', "no valid JSON"),
        (b'{"t": "a", "t": "b"}', "same key twice"),
        (b'{"t": "\\ud800"}', "row 2"),
        (b'{"t": NaN}', "NaN is not JSON"),
        (b'{"t": 1' + b"0" * 5000 + b"}", "row 2"),
        (b'{"t": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", "nested too deep"),
        (b'{"t": "' + b"x" * 100_000 + b'"}', "more than 100000 bytes"),
        (b"x" * 3_000_000, "more than 100000 bytes"),
        (b"null", "no object"),
        (b"\xff\xfe{\x00", "not UTF-8"),
    ],
)
async def test_a_line_that_is_no_row_is_named(files: Files, line: bytes, words: str) -> None:
    """By its number, with what is wrong with it; the rows before it were read."""
    error = await files.refused("bad.jsonl", b'{"t": "first"}\n' + line + b'\n{"t": "third"}\n', t=JSON)
    assert words in error.detail
    assert error.extra["row"] == 2


async def test_csv_as_spreadsheets_write_it(files: Files) -> None:
    """Quotes, line breaks in cells, blank lines, cells that hold JSON."""
    dialog = json.dumps(MESSAGES).replace('"', '""')
    content = f'\ufefft,n,j,d,m\r\n"a, ""b""\nc",-1.5e3,"[1, null]","{dialog}",https://e.com/a.png\r\n\r\n,7,true,[],data:\r\n'
    columns = {"t": TEXT, "n": NUMBER, "j": JSON, "d": DIALOG, "m": MEDIA}
    assert await files.read("a.csv", content, **columns) == [
        {"t": 'a, "b"\nc', "n": -1500.0, "j": [1, None], "d": MESSAGES, "m": "https://e.com/a.png"},
        {"t": "", "n": 7, "j": True, "d": [], "m": "data:"},
    ]
    assert [row["n"] for row in await files.again("a.csv", columns, offset=1)] == [7]
    assert await files.read("b.csv", "t\n", t=TEXT) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("t,n\na,1\nb\n", "row 2: it has 1 cells, and the first line names 2 columns"),
        ("t,n\na,1\nb,2,3\n", "row 2"),
        ("t,n\na,1\nb,two\n", "row 2, column 'n'"),
        ("t,n\na,1\nb,\n", "row 2, column 'n'"),
        ("t,n\na,1\nb,true\n", "row 2, column 'n'"),
        ("t,t\na,1\n", "names a column twice"),
        ("t\na\n", "row 1, column 'n'"),
        ("t,n,x\na,1,2\n", "row 1, column 'x'"),
        ('t,n\na,1\n"b,2\n', "row 2: it is no valid CSV"),
        ('t,n\na,1\n"b"c,2\n', "row 2: it is no valid CSV"),
        ("t,n\na,1\n" + "b" * 100_001 + ",2\n", "row 2"),
        ("t,n\na,1\n" + "," * 3_000_000, "row 2"),
        ('t,n\na,1\n"' + "b\n" * 60_000 + '",2\n', "row 2"),
    ],
)
async def test_csv_that_is_wrong_is_named_by_its_row(files: Files, content: str, words: str) -> None:
    """Rows count from the one below the names."""
    assert words in (await files.refused("bad.csv", content, t=TEXT, n=NUMBER)).detail


async def test_csv_that_is_no_utf8_is_refused(files: Files) -> None:
    """Guessing an encoding would change what people wrote."""
    assert "not UTF-8: byte 0xe9" in (await files.refused("bad.csv", b"t\na\ncaf\xe9\n", t=TEXT)).detail
    assert (await files.read("nul.csv", "t\na\0b\n", t=TEXT)) == [{"t": "a\0b"}]


def parquet(columns: Mapping[str, Sequence[Any]], types: Mapping[str, Any] | None = None, **settings: Any) -> bytes:
    """A Parquet file of these columns."""
    core, arro3_io = pytest.importorskip("arro3.core"), pytest.importorskip("arro3.io")
    arrays = [core.Array(values, (types or {}).get(name, core.DataType.string())) for name, values in columns.items()]
    file = io.BytesIO()
    arro3_io.write_parquet(core.Table.from_arrays(arrays, names=list(columns)), file, **settings)
    return file.getvalue()


async def test_parquet_is_read_by_columns_of_any_kind(files: Files) -> None:
    """Text, numbers, and JSON or dialogs in text; a span skips without reading."""
    core = pytest.importorskip("arro3.core")
    content = parquet(
        {"t": ["a", UNICODE, ""] * 100, "n": [1, 2, 3] * 100, "d": [json.dumps(MESSAGES)] * 300},
        {"n": core.DataType.int64()},
        compression="zstd(3)",
    )
    columns = {"t": TEXT, "n": NUMBER, "d": DIALOG}
    rows = await files.read("a.parquet", content, **columns)
    assert rows[:2] == [{"t": "a", "n": 1, "d": MESSAGES}, {"t": UNICODE, "n": 2, "d": MESSAGES}]
    assert len(rows) == 300
    assert await files.again("a.parquet", columns, offset=199, limit=70) == rows[199:269]


async def test_structs_of_parquet_are_messages(files: Files) -> None:
    """A struct has every key, null where a message leaves it out."""
    pytest.importorskip("arro3.io")
    import arro3.core
    import arro3.io

    kinds = arro3.core.DataType
    message = kinds.struct([arro3.core.Field(name, kinds.string(), nullable=True) for name in ("role", "content", "x")])
    schema = arro3.core.Schema(
        [arro3.core.Field("d", kinds.list(arro3.core.Field("item", message, nullable=True)), nullable=True)]
    )
    lines = io.BytesIO(json.dumps({"d": [{"role": "user", "content": "hi", "x": None}]}).encode())
    file = io.BytesIO()
    arro3.io.write_parquet(arro3.io.read_json(lines, schema), file)
    assert await files.read("a.parquet", file.getvalue(), d=DIALOG) == [{"d": [{"role": "user", "content": "hi"}]}]


@pytest.mark.parametrize("cut", [0, 3, 100, -1, -8, -100])
async def test_parquet_that_is_cut_or_is_none_is_refused(files: Files, cut: int) -> None:
    """A download that broke off; the parser is Rust, and panics."""
    content = parquet({"t": ["some text", "and more"] * 500})
    error = await files.refused("bad.parquet", content[:cut], t=TEXT)
    assert isinstance(error, UnreadableDocumentError)
    assert "parquet" in error.detail or "Parquet" in error.detail or "crashed" in error.detail


async def test_no_flip_of_a_bit_in_parquet_gets_past_the_reader(files: Files) -> None:
    """Rows or a typed error, each time: 30 places all over the file."""
    content = bytearray(parquet({"t": [f"text number {n}" for n in range(200)]}))
    for place in range(0, len(content), max(1, len(content) // 30)):
        content[place] ^= 0x10
        with suppress(InvalidRequestError):
            await files.read("flip.parquet", bytes(content), t=TEXT)
        content[place] ^= 0x10


async def test_a_parquet_bomb_is_refused(files: Files) -> None:
    """A cell larger than the child's memory, and rows without end in a small file."""
    huge = parquet({"t": ["x" * 40_000_000]}, compression="zstd(3)", dictionary_enabled=False)
    assert len(huge) < 20_000
    said = (await files.refused("cell.parquet", huge, t=TEXT)).detail
    assert any(words in said for words in ("has more than 100000 bytes", "more memory", "too much memory"))
    many = parquet({"t": ["y" * 90_000] * 1000}, compression="zstd(3)")
    assert "unpacks to far more than its size" in (await files.refused("many.parquet", many, t=TEXT)).detail


async def test_bytes_in_parquet_are_refused_by_column(files: Files) -> None:
    """Written as text they would be something else."""
    core = pytest.importorskip("arro3.core")
    content = parquet({"b": [b"\xff"]}, {"b": core.DataType.binary()})
    assert "column 'b' cannot be read: it holds bytes" in (await files.refused("b.parquet", content, b=TEXT)).detail


async def test_without_its_package_parquet_names_the_extra(
    files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """JSON lines and CSV need nothing."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: no site-packages
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    assert "llama-stack-data[parquet]" in (await files.refused("a.parquet", b"PAR1", t=TEXT)).detail
    assert await files.read("a.csv", "t\nx\n", t=TEXT) == [{"t": "x"}]


async def test_a_dataset_larger_than_the_memory_it_may_take_is_read(files: Files) -> None:
    """The child may have 256 MB here, and the file is larger; this process must not grow either."""
    line = b'{"n": 1}' + b" " * 90_000 + b"\n"
    with (files.folder / "large.jsonl").open("wb") as file:
        for _ in range(3200):
            file.write(line)
    dataset = Dataset(columns={"n": NUMBER}, content_url=f"file://{files.folder}/large.jsonl", metadata={})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = await files.datasets.read(ReadDatasetRequest(dataset=dataset))
    assert sum([row == {"n": 1} async for row in rows]) == 3200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


async def test_a_reader_that_hangs_is_given_up(tmp_path: Path) -> None:
    """A pipe under the name of a file would; here the child is stopped by its own limit of time."""
    config = DatasetsConfig.read({"rows": {"seconds": 0.001}})
    async with opened(tmp_path, config) as datasets:
        dataset = Dataset(columns={"n": NUMBER}, content_url="data:text/csv,n%0A1", metadata={})
        with pytest.raises(UnreadableDocumentError, match="a row takes more than 0.001 s"):
            await rows_of(datasets, dataset)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
async def test_leaving_out_rows_is_no_silence(files: Files, name: str) -> None:
    """A reader that skips a million rows is at work, and must not be taken for one that hangs."""
    from llama_stack_data.datasets.reader import READERS

    numbers = [str(n) for n in range(30_000)]
    content = {
        "a.jsonl": "".join(f'{{"t": "{n}"}}\n' for n in numbers).encode(),
        "a.csv": ("t\n" + "\n".join(numbers)).encode(),
        "a.parquet": parquet({"t": numbers}) if name == "a.parquet" else b"",
    }[name]
    request = {"columns": {"t": "text"}, "offset": 29_999, "row_bytes": 1000, "output_bytes": 10**6}
    *skipped, last = READERS[name.partition(".")[2]](io.BytesIO(content), request)
    assert skipped == [None] * len(skipped)
    assert len(skipped) >= 2
    assert last == b'{"t": "29999"}' or last == b'{"t":"29999"}'
    (files.folder / name).write_bytes(content)
    assert await files.again(name, {"t": TEXT}, offset=29_999) == [{"t": "29999"}]
    assert await files.again(name, {"t": TEXT}, offset=30_000) == []


async def test_only_so_many_are_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A further one waits for its turn, and is told when none comes."""
    monkeypatch.setattr("llama_stack_data.datasets.rows.WAIT_SECONDS", 0.05)
    async with opened(tmp_path, DatasetsConfig.read({"rows": {"readers": 1}})) as datasets:
        dataset = Dataset(columns={"n": NUMBER}, content_url="data:text/csv,n%0A1%0A2", metadata={})
        first: Any = await datasets.read(ReadDatasetRequest(dataset=dataset))
        assert await anext(first) == {"n": 1}
        with pytest.raises(OverloadedError, match="1 datasets are being read already"):
            await rows_of(datasets, dataset)
        await first.aclose()
        assert len(await rows_of(datasets, dataset)) == 2


async def test_a_reader_that_is_left_leaves_no_process(files: Files) -> None:
    """A client that hangs up must not leave a child behind."""
    dataset = files.dataset("a.jsonl", b'{"n": 1}\n' * 200_000, n=NUMBER)
    rows: Any = await files.datasets.read(ReadDatasetRequest(dataset=dataset))
    await anext(rows)
    assert list(_children())
    await rows.aclose()
    assert not list(_children())


def _children() -> Iterator[int]:
    """The readers among the processes that this one started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid() and b"datasets/reader.py" in (folder / "cmdline").read_bytes():
                yield int(folder.name)
        except OSError:
            continue


@pytest.mark.parametrize(
    "name", ["../outside.jsonl", "link.jsonl", "folder.jsonl", "pipe.jsonl", "%2e%2e/outside.jsonl"]
)
async def test_nothing_outside_the_roots_is_read(files: Files, name: str) -> None:
    """The fetcher's rules hold here too."""
    (files.folder.parent / "outside.jsonl").write_text('{"n": 1}\n')
    (files.folder / "link.jsonl").symlink_to(files.folder.parent / "outside.jsonl")
    (files.folder / "folder.jsonl").mkdir()
    os.mkfifo(files.folder / "pipe.jsonl")
    dataset = Dataset(columns={"n": NUMBER}, content_url=f"file://{files.folder}/{name}", metadata={})
    with pytest.raises(UrlNotAllowedError):
        await rows_of(files.datasets, dataset)


async def test_a_stored_url_of_nothing_is_a_fault_of_the_request(files: Files) -> None:
    """Somebody guessed, or the rows are gone."""
    for url in (stored_url("0" * 64), "file://datasets/../x.jsonl", "file://datasets/" + "0" * 63 + ".jsonl"):
        with pytest.raises(InvalidRequestError):
            await rows_of(files.datasets, Dataset(columns={"n": NUMBER}, content_url=url, metadata={}))


async def test_rows_that_a_killed_process_left_are_swept_away(tmp_path: Path) -> None:
    """A blob that was put and never named; what is named stays."""
    async with open_store("sqlite", tmp_path) as store:
        blobs = store.blobs("datasets.datasets")
        await blobs.put(b"orphan")
        database = store.database("datasets.datasets")
        async with start_datasets(DatasetsConfig(), database, blobs) as datasets:
            assert await blobs.digests() == []
            await datasets.store(StoreDatasetRequest(uuid="a", columns={"n": NUMBER}, rows=[{"n": 1}]))
        async with start_datasets(DatasetsConfig(), database, blobs) as datasets:
            assert len(await blobs.digests()) == 1
            await datasets.delete_dataset("a")
            assert await blobs.digests() == []


async def test_a_damaged_blob_is_never_read_as_rows(tmp_path: Path) -> None:
    """Bits rot."""
    async with opened(tmp_path, DatasetsConfig()) as datasets:
        request = StoreDatasetRequest(uuid="a", columns={"n": NUMBER}, rows=[{"n": 1}])
        dataset = await datasets.store(request)
        (blob,) = (path for path in (tmp_path / "blobs").rglob("*") if path.is_file() and len(path.name) == 64)
        blob.write_bytes(b'{"n":2}\n')
        with pytest.raises(BlobCorruptError):
            await rows_of(datasets, dataset)
        await datasets.store(request)
        assert await rows_of(datasets, dataset) == [{"n": 1}]


async def test_a_list_goes_beyond_a_page(tmp_path: Path) -> None:
    """Descriptions are read some at a time."""
    async with opened(tmp_path, DatasetsConfig()) as datasets:
        dataset = Dataset(columns={}, content_url="data:text/csv,", metadata={})
        names = [f"d{n:03}" for n in range(205)]
        for name in names:
            await datasets.create_dataset(CreateDatasetRequest(uuid=name, dataset=dataset))
        assert await ids_of(datasets) == names


async def test_rows_come_over_http_by_the_guarded_fetcher(tmp_path: Path) -> None:
    """Spooled to the folder that the operator named, judged by the fetcher, read as the type that was served."""
    net = Net()
    async with open_store("sqlite", tmp_path / "state") as store:
        blobs = store.blobs("datasets.d")
        fetcher = Fetcher(FetchConfig(hosts=("public.example",)), network=net)
        reader = RowReader(RowLimits())
        database = store.database("datasets.d")
        datasets = DatasetsProvider(DatasetStore(database, blobs), Content(fetcher, blobs, tmp_path), reader)

        async def read(url: str) -> list[dict[str, Any]]:
            return await rows_of(datasets, Dataset(columns={"n": NUMBER}, content_url=url, metadata={}))

        async with serving(net, answering(ok(b"n\n1\n2\n", "content-type: text/csv; charset=utf-8"))):
            assert await read("http://public.example/rows") == [{"n": 1}, {"n": 2}]
            assert await read("http://public.example/rows.csv?a=.jsonl") == [{"n": 1}, {"n": 2}]
            with pytest.raises(InvalidRequestError, match="row 1"):
                await read("http://public.example/rows.jsonl")
            for url in ("http://10.0.0.5/rows.csv", "http://other.example/rows.csv"):
                with pytest.raises(UrlNotAllowedError):
                    await read(url)
    assert net.honeypot == 0
    assert [path.name for path in tmp_path.iterdir()] == ["state"]

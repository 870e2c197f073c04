"""What every provider of MemoryBanks must keep to, as a class of tests that a provider's own tests subclass::

    class TestMyBanks(MemoryBanksConformance):
        @asynccontextmanager
        async def open(self, folder: Path) -> AsyncIterator[MemoryBanks]:
            async with my_banks(folder) as banks:
                yield banks

Run it with pytest and anyio's plugin, on asyncio. ``open`` is called again on the same folder for a restart.
"""

from __future__ import annotations

import asyncio
import itertools
from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ..apis import MemoryBanks
from ..apis.filters import parse_filter
from ..apis.memory_banks import MemoryBankDocument, QueryHit, QueryMode, QueryRequest
from ..errors import AlreadyExistsError, ConflictError, InvalidRequestError, NotFoundError, UnreadableDocumentError

T = TypeVar("T")

LONG_KEY = "".join(chr(33 + n * n * 7 % 91) for n in range(5000))
METADATA: Sequence[dict[str, Any]] = (
    {"year": 1997, "lang": "no", "open": True},
    {"year": 1997.0, "lang": "sv", "open": False},
    {"year": 2003, "lang": "da"},
    {"year": "1997", "lang": "NO", "tags": ["a"], "open": None},
    {"lang": "nø", "year": -0.5},
    {"lang": "", "year": 0, "deep": {"lang": "no"}},
    {"year": 10**30, "lang": "\U0001f600"},
    {},
    {"lang": "\u00e9", LONG_KEY: 1, "": 2},
    {"lang": "e\u0301", LONG_KEY[1:]: 1, "year": 2**53 + 1},
)
"""Metadata of documents 0, 1, ... of the tests of filters: equal numbers of two types, texts that look like numbers."""

FILTERS: Sequence[dict[str, Any]] = (
    {"eq": ["year", 1997]},
    {"eq": ["year", "1997"]},
    {"ne": ["year", 1997]},
    {"lt": ["year", 1997]},
    {"le": ["year", 1997]},
    {"gt": ["year", 0]},
    {"ge": ["year", -0.0]},
    {"lt": ["lang", "nz"]},
    {"gt": ["lang", "no"]},
    {"eq": ["open", False]},
    {"lt": ["open", True]},
    {"eq": ["open", 0]},
    {"in": ["lang", ["no", "sv", 7]]},
    {"in": ["lang", []]},
    {"and": []},
    {"or": []},
    {"and": [{"eq": ["lang", "no"]}, {"gt": ["year", 1900]}]},
    {"or": [{"eq": ["lang", "da"]}, {"not": {"ge": ["year", -1]}}]},
    {"not": {"eq": ["missing", "x"]}},
    {"eq": ["tags", "a"]},
    {"eq": ["lang", "\U0001f600"]},
    {"eq": ["lang", "\u00e9"]},
    {"eq": [LONG_KEY, 1]},
    {"ne": [LONG_KEY, 1]},
    {"eq": ["", 2]},
    {"eq": ["deep.lang", "no"]},
    {"eq": ["year", 2**53]},
    {"gt": ["year", float(2**53)]},
    {"not": {"not": {"lt": ["year", 0]}}},
)

WORDS: Sequence[tuple[str, str]] = (
    ("See example.com/manual for it.", "example manual"),
    ("Write to jane@corp.org today.", "jane@corp.org"),
    ("It needs python 3.11 and /etc/passwd.", "3.11"),
    ("It needs version v2.5.1 or newer.", "2.5"),
    ("Edit /etc/hosts, then restart.", "hosts"),
    ("It was -17 degrees.", "17"),
    ("Call user_name_of twice.", "name"),
    ("An E-404 error in a state-of-the-art oven.", "404 oven"),
    ("He said \u201cindeed\u201d\u2014and left.", "indeed"),
    ("<b>Bold</b> &amp; https://a.io/q?x=1&y=77", "bold 77"),
    ("On 2024-01-05 at 12:30 for 5,000.", "2024-01-05"),
    ("\u00c5rsm\u00f8te p\u00e5 caf\u00e9en", "\u00e5rsm\u00f8te"),
    ("Two e\u0301clairs, please.", "\u00e9clairs"),
    ("Three soufl\u00e9s, please.", "soufle\u0301s"),
    ("\u03a4\u03a1\u0399\u03a4\u0397", "\u03c4\u03c1\u03b9\u03c4\u03b7"),
    ("\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e", "\u0939\u093f\u0928\u094d\u0926\u0940"),
)
"""Texts, and words that find them: people search for what they see, and not for what a parser makes of it."""

UNICODE = "Ærø, Τρίτη, 東京, עברית, e\u0301, \U0001f600\U0001f3fd, \u202eright to left"


def document(
    uuid: str, text: str | bytes, metadata: dict[str, Any] | None = None, mime_type: str = "text/plain"
) -> MemoryBankDocument:
    """A document of this text."""
    content = text.encode() if isinstance(text, str) else text
    return MemoryBankDocument(uuid=uuid, content=content, metadata=metadata or {}, mime_type=mime_type)


async def all_of(lines: AsyncIterator[T]) -> list[T]:
    """The items of a reply that is lines."""
    return [item async for item in lines]


async def contents(banks: MemoryBanks, bank: str, *uuids: str) -> dict[str, bytes]:
    """The bytes of those documents that are in the bank."""
    return {d.uuid: d.content for d in await all_of(await banks.get_documents(bank, list(uuids)))}


async def hits(banks: MemoryBanks, bank: str, text: str | None = None, **more: Any) -> list[QueryHit]:
    """What a query finds."""
    return (await banks.query(QueryRequest(bank_uuid=bank, text=text, **more))).hits


async def found(banks: MemoryBanks, bank: str, text: str | None = None, **more: Any) -> list[str]:
    """The ids of the documents that a query finds, best first, each once."""
    return list(dict.fromkeys(hit.document_uuid for hit in await hits(banks, bank, text, **more)))


ATLAS = (
    document("oslo", "Oslo is the capital of Norway.", {"country": "no"}),
    document("bergen", "Bergen is a rainy city on the western coast of Norway.", {"country": "no"}),
    document("rome", "Rome is the capital of Italy, and was that of an empire.", {"country": "it"}),
)


class MemoryBanksConformance:
    """Subclass it, and say how a provider is opened."""

    pytestmark = pytest.mark.anyio

    is_exact = True
    """Whether a search by vector misses nothing; set it to False for an approximate index."""

    @abstractmethod
    def open(self, folder: Path) -> AbstractAsyncContextManager[MemoryBanks]:
        """A provider whose state lies in ``folder``; it is closed at the end of the block."""

    @pytest.fixture
    async def banks(self, tmp_path: Path) -> AsyncIterator[MemoryBanks]:
        """A provider with the bank ``atlas``, which holds three documents, and the empty bank ``empty``."""
        async with self.open(tmp_path / "state") as banks:
            await banks.create("atlas", "Atlas", list(ATLAS))
            await banks.create("empty", "Empty", [])
            yield banks

    async def test_banks_are_listed_and_dropped(self, banks: MemoryBanks) -> None:
        """A dropped bank is gone with all it held, and its id is free."""
        assert [(b.uuid, b.name) for b in await all_of(await banks.list_banks())] == [
            ("atlas", "Atlas"),
            ("empty", "Empty"),
        ]
        assert await banks.drop("atlas") == "atlas"
        assert [b.uuid for b in await all_of(await banks.list_banks())] == ["empty"]
        await banks.create("atlas", "Another", [])
        assert await hits(banks, "atlas", "capital") == []
        assert await contents(banks, "atlas", "oslo") == {}

    async def test_creating_again_succeeds_only_with_the_same_request(self, banks: MemoryBanks) -> None:
        """A client that got no answer repeats its request (spec rule G10)."""
        await banks.insert("atlas", [document("new", "Something new.")])
        await banks.create("atlas", "Atlas", list(ATLAS))
        assert await contents(banks, "atlas", "new") == {"new": b"Something new."}
        for call in (
            banks.create("atlas", "Other", list(ATLAS)),
            banks.create("atlas", "Atlas", list(ATLAS)[:2]),
            banks.create("atlas", "Atlas", [*ATLAS[:2], document("rome", "Rome.")]),
            banks.create("atlas", "Atlas", list(ATLAS), chunk_tokens=50),
        ):
            with pytest.raises(AlreadyExistsError):
                await call
        assert len(await contents(banks, "atlas", "oslo", "bergen", "rome", "new")) == 4

    async def test_every_operation_names_a_bank_that_is_not_there(self, banks: MemoryBanks) -> None:
        """404, whatever else the request holds."""
        for call in (
            banks.insert("none", [document("a", "A")]),
            banks.insert("none", []),
            banks.update("none", []),
            banks.get_documents("none", []),
            banks.delete_documents("none", []),
            banks.drop("none"),
            banks.query(QueryRequest(bank_uuid="none", text="a")),
            banks.preview("none", []),
        ):
            with pytest.raises(NotFoundError, match="none"):
                await call

    async def test_get_answers_in_the_order_asked_and_skips_what_is_missing(self, banks: MemoryBanks) -> None:
        """Exactly the bytes, metadata and media type that were stored come back (spec rule G17)."""
        odd = document("odd", b"\xef\xbb\xbfa\r\nb", {"n": 1, "deep": [None, {"x": 1.5}]}, "text/plain; charset=UTF-8")
        await banks.insert("atlas", [odd])
        got = await all_of(await banks.get_documents("atlas", ["rome", "none", "odd", "oslo"]))
        assert got == [ATLAS[2], odd, ATLAS[0]]
        assert await contents(banks, "atlas") == {}

    async def test_insert_refuses_what_exists_and_adds_nothing(self, banks: MemoryBanks) -> None:
        """All or nothing, and each id that stands in the way is named."""
        with pytest.raises(ConflictError) as refused:
            await banks.insert("atlas", [document("new", "New."), document("rome", "R."), document("oslo", "O.")])
        assert [fault.pointer for fault in refused.value.faults] == ["/1/uuid", "/2/uuid"]
        assert await contents(banks, "atlas", "new", "rome") == {"rome": ATLAS[2].content}
        assert await found(banks, "atlas", "New.", mode=QueryMode.KEYWORD) == []

    async def test_update_replaces_whole_documents_or_none(self, banks: MemoryBanks) -> None:
        """What was there before can no longer be found."""
        with pytest.raises(NotFoundError) as refused:
            await banks.update("atlas", [document("oslo", "Changed."), document("none", "N.")])
        assert [fault.pointer for fault in refused.value.faults] == ["/1/uuid"]
        assert await found(banks, "atlas", "capital of Norway", k=1) == ["oslo"]
        await banks.update("atlas", [document("oslo", "A fjord with islands.", {"kind": "sea"})])
        assert await contents(banks, "atlas", "oslo") == {"oslo": b"A fjord with islands."}
        assert await found(banks, "atlas", "capital", mode=QueryMode.KEYWORD) == ["rome"]
        (hit,) = await hits(banks, "atlas", "islands", mode=QueryMode.KEYWORD)
        assert (hit.document_uuid, hit.text, hit.metadata) == ("oslo", "A fjord with islands.", {"kind": "sea"})
        assert await found(banks, "atlas", filter={"eq": ["country", "no"]}) == ["bergen"]

    async def test_the_ids_of_a_request_must_differ(self, banks: MemoryBanks) -> None:
        """Which of the two should be kept, nobody can say."""
        twice = [document("a", "One."), document("a", "Two.")]
        for call in (banks.insert("atlas", twice), banks.create("new", "New", twice), banks.update("atlas", twice)):
            with pytest.raises(InvalidRequestError) as refused:
                await call
            assert refused.value.faults[0].pointer == "/1/uuid"

    async def test_delete_answers_with_the_ids_that_were_there(self, banks: MemoryBanks) -> None:
        """Each once; an empty list deletes nothing."""
        assert await all_of(await banks.delete_documents("atlas", [])) == []
        asked = ["rome", "none", "oslo", "rome"]
        assert await all_of(await banks.delete_documents("atlas", asked)) == ["rome", "oslo"]
        assert await all_of(await banks.delete_documents("atlas", asked)) == []
        assert await contents(banks, "atlas", "rome", "oslo", "bergen") == {"bergen": ATLAS[1].content}

    @pytest.mark.parametrize("mode", list(QueryMode))
    async def test_what_was_deleted_is_found_by_no_query(self, banks: MemoryBanks, mode: QueryMode) -> None:
        """The promise on which people delete."""
        secret = "The password of the vault is swordfish. "
        await banks.insert("atlas", [document("secret", secret * 40), document("other", secret * 40)])
        assert {"secret", "other"} <= set(await found(banks, "atlas", "vault password", mode=mode, k=100))
        await all_of(await banks.delete_documents("atlas", ["secret"]))
        await banks.update("atlas", [document("other", "Nothing.")])
        for hit in await hits(banks, "atlas", "vault password", mode=mode, k=100):
            assert "swordfish" not in hit.text
        assert not any("swordfish" in hit.text for hit in await hits(banks, "atlas", k=1000))

    async def test_what_was_written_is_found_at_once(self, banks: MemoryBanks) -> None:
        """Searchable when the write answers, also after other writes."""
        for n in range(20):
            await banks.insert("empty", [document(f"d{n}", f"This one tells of the number word{n}.")])
            assert await found(banks, "empty", f"word{n}", k=1) == [f"d{n}"]
            assert await found(banks, "empty", f"word{n}", mode=QueryMode.KEYWORD) == [f"d{n}"]

    async def test_scores_fall_and_the_best_comes_first(self, banks: MemoryBanks) -> None:
        """In every mode."""
        for mode in QueryMode:
            scores = [hit.score for hit in await hits(banks, "atlas", "the capital of Norway", mode=mode)]
            assert scores == sorted(scores, reverse=True)
            assert await found(banks, "atlas", "the capital of Norway", mode=mode, k=1) == ["oslo"]

    async def test_hybrid_order_is_that_of_the_ranks(self, banks: MemoryBanks) -> None:
        """A hit scores 1 / (60 + place) for each of the two searches that has it (reciprocal rank fusion)."""
        query = "a rainy capital"
        expected: dict[str, float] = {}
        for mode in (QueryMode.VECTOR, QueryMode.KEYWORD):
            for place, hit in enumerate(await hits(banks, "atlas", query, mode=mode), 1):
                expected[hit.document_uuid] = expected.get(hit.document_uuid, 0) + 1 / (60 + place)
        got = {hit.document_uuid: hit.score for hit in await hits(banks, "atlas", query)}
        assert got == pytest.approx(expected)

    async def test_filters_mean_the_same_everywhere(self, banks: MemoryBanks) -> None:
        """The stores that compare in a database agree with the language's own definition."""
        documents = [document(str(n), "Snow falls.", metadata) for n, metadata in enumerate(METADATA)]
        await banks.insert("empty", documents)
        for condition in FILTERS:
            parsed = parse_filter(condition)
            expected = {str(n) for n, metadata in enumerate(METADATA) if parsed.holds(metadata)}
            for mode in QueryMode:
                got = set(await found(banks, "empty", "snow", mode=mode, k=100, filter=condition))
                assert got == expected, (condition, mode)
            assert set(await found(banks, "empty", k=100, filter=condition)) == expected

    async def test_a_filter_chooses_before_the_best_are_counted(self, banks: MemoryBanks) -> None:
        """Otherwise k hits of which the filter leaves none would hide those it would let through."""
        many = [document(f"near{n}", "The capital of Norway.", {"keep": False}) for n in range(30)]
        await banks.insert("atlas", [*many, document("far", "A rainy capital.", {"keep": True})])
        for mode in QueryMode:
            query = "the capital of Norway"
            assert await found(banks, "atlas", query, mode=mode, k=2, filter={"eq": ["keep", True]}) == ["far"]

    async def test_a_filter_that_says_nothing_is_refused(self, banks: MemoryBanks) -> None:
        """A mistake in a filter must never read as 'everything'; the fault says where it is."""
        deep: dict[str, Any] = {"eq": ["a", 1]}
        for _ in range(20):
            deep = {"not": deep}
        for wrong, pointer in (
            ({}, "/filter"),
            ({"eq": ["a", 1], "ne": ["a", 2]}, "/filter"),
            ({"like": ["a", "b"]}, "/filter/like"),
            ({"eq": ["a"]}, "/filter/eq"),
            ({"eq": [1, 1]}, "/filter/eq"),
            ({"eq": ["a", None]}, "/filter/eq/1"),
            ({"in": ["a", "b"]}, "/filter/in/1"),
            ({"in": ["a", [1, {}]]}, "/filter/in/1/1"),
            ({"and": [{"eq": ["a", 1]}, {"or": {}}]}, "/filter/and/1/or"),
            ({"in": ["a", list(range(1000))]}, "/filter/in/1/256"),
            (deep, "/filter" + "/not" * 16),
        ):
            with pytest.raises(InvalidRequestError) as refused:
                await found(banks, "atlas", "a", filter=wrong)
            assert refused.value.faults[0].pointer == pointer

    async def test_a_query_by_embedding_must_have_the_banks_dimensions(self, banks: MemoryBanks) -> None:
        """A vector of another model would find anything; one that points nowhere finds nothing."""
        for embedding in ([1.0], [0.0] * 7):
            with pytest.raises(InvalidRequestError, match="embedding"):
                await banks.query(QueryRequest(bank_uuid="atlas", embedding=embedding))

    async def test_a_query_without_words_finds_nothing_and_one_without_text_lists(self, banks: MemoryBanks) -> None:
        """Neither is an error, but for a keyword query, which needs a text."""
        assert await hits(banks, "atlas", "?! ...", mode=QueryMode.KEYWORD) == []
        assert await hits(banks, "atlas", "", mode=QueryMode.VECTOR) == []
        assert await found(banks, "atlas", k=2) == ["oslo", "bergen"]
        with pytest.raises(InvalidRequestError):
            await hits(banks, "atlas", mode=QueryMode.KEYWORD)

    async def test_words_of_a_query_are_words_and_no_syntax(self, banks: MemoryBanks) -> None:
        """What a user types is never read as the operators of a search engine."""
        for text in (
            '"',
            'capital" OR "',
            "capital AND NOT Norway",
            "text:capital",
            "cap*",
            "NEAR(a b)",
            "':&|!",
            UNICODE,
        ):
            for mode in QueryMode:
                await hits(banks, "atlas", text, mode=mode)
        assert "rome" in await found(banks, "atlas", "capital NOT Italy", mode=QueryMode.KEYWORD)

    async def test_words_are_letters_and_digits_whatever_stands_around_them(self, banks: MemoryBanks) -> None:
        """Addresses, versions, signs, hyphens, accents and capitals do not hide a word from whoever searches it."""
        await banks.insert("empty", [document(f"d{n}", text) for n, (text, _) in enumerate(WORDS)])
        for n, (text, query) in enumerate(WORDS):
            assert (await found(banks, "empty", query, mode=QueryMode.KEYWORD, k=1)) == [f"d{n}"], (text, query)
        for nothing in ("_", "-", "\u0301"):
            assert await found(banks, "empty", nothing, mode=QueryMode.KEYWORD) == []

    async def test_words_of_one_stem_do_not_hide_a_hit_from_a_hybrid_query(self, banks: MemoryBanks) -> None:
        """However often a query says it: the share of words that a chunk needs can be reached."""
        await banks.insert("empty", [document("ship", "The ship sails."), document("other", "Nothing of the kind.")])
        query = "Ship ships shipped shipping SHIP, but only between themselves"
        (hit, *_) = await hits(banks, "empty", query, k=1)
        assert hit.document_uuid == "ship"
        assert hit.score == pytest.approx(2 / 61)

    async def test_text_of_any_script_is_kept_and_found(self, banks: MemoryBanks) -> None:
        """In ids, names, metadata and contents."""
        bank = "банк/😀 %_'\""
        await banks.create(bank, UNICODE[:100], [document(UNICODE[:80], UNICODE, {UNICODE: UNICODE, "nul": "a\0b"})])
        (got,) = await all_of(await banks.get_documents(bank, [UNICODE[:80]]))
        assert (got.content.decode(), got.metadata) == (UNICODE, {UNICODE: UNICODE, "nul": "a\0b"})
        for condition in ({"eq": [UNICODE, UNICODE]}, {"eq": ["nul", "a\0b"]}):
            (hit,) = await hits(banks, bank, "Τρίτη", filter=condition)
            assert hit.text == UNICODE
        assert await banks.drop(bank) == bank

    async def test_an_empty_document_is_kept_and_never_found(self, banks: MemoryBanks) -> None:
        """There is nothing in it to find; white space is no different."""
        await banks.insert("empty", [document("nothing", b""), document("blank", " \n\n\t ")])
        assert await contents(banks, "empty", "nothing", "blank") == {"nothing": b"", "blank": b" \n\n\t "}
        assert await hits(banks, "empty", "anything") == []
        assert await all_of(await banks.delete_documents("empty", ["nothing"])) == ["nothing"]

    async def test_a_huge_document_is_found_to_its_last_word(self, banks: MemoryBanks) -> None:
        """Two megabytes, one line of them without a space."""
        text = "x" * 500_000 + "\n" + "The sheep graze on the hill all day. " * 40_000 + "Zanzibar lies far away."
        await banks.insert("empty", [document("huge", text)])
        for mode in (QueryMode.KEYWORD, QueryMode.HYBRID) if self.is_exact else (QueryMode.KEYWORD,):
            assert "Zanzibar lies far away." in (await hits(banks, "empty", "Zanzibar", mode=mode, k=1))[0].text
        assert await contents(banks, "empty", "huge") == {"huge": text.encode()}

    async def test_what_cannot_be_read_is_refused_with_the_reason(self, banks: MemoryBanks) -> None:
        """Never stored as an empty document, and nothing beside it is stored."""
        for wrong in (
            document("b", b"caf\xe9 is not UTF-8"),
            document("b", "a\0b"),
            document("b", "text", mime_type="application/x-unheard-of"),
            document("b", "text", mime_type="text/plain; charset=klingon"),
            document("b", "text", mime_type="text/plain; name=a\0b"),
        ):
            with pytest.raises(UnreadableDocumentError) as refused:
                await banks.insert("empty", [document("a", "Fine."), wrong])
            assert refused.value.faults[0].pointer == "/1/content"
        assert await contents(banks, "empty", "a", "b") == {}

    async def test_a_preview_shows_the_chunks_and_stores_nothing(self, banks: MemoryBanks) -> None:
        """The chunks cover the text, are no longer than the bank says, and are those that a query finds."""
        await banks.create("fine", "Fine", [], chunk_tokens=20, chunk_overlap=5)
        text = " ".join(f"Sentence number {n} says that {n} follows {n - 1}." for n in range(1, 60))
        chunks = await all_of(await banks.preview("fine", [document("d", text)]))
        assert len(chunks) > 20
        assert all(0 < c.tokens <= 20 and c.text == text[c.start : c.end] for c in chunks)
        assert all(b.start <= a.end for a, b in itertools.pairwise(chunks) if text[a.end : b.start].strip())
        assert (chunks[0].start, chunks[-1].end) == (0, len(text))
        assert await contents(banks, "fine", "d") == {}
        await banks.insert("fine", [document("d", text)])
        assert [hit.text for hit in await hits(banks, "fine", k=1000)] == [c.text for c in chunks]

    async def test_everything_is_there_after_a_restart(self, tmp_path: Path) -> None:
        """And searches as before: settings, order, filters, and what was deleted stays so."""
        folder = tmp_path / "restarted"
        async with self.open(folder) as banks:
            await banks.create("atlas", "Atlas", list(ATLAS), chunk_tokens=30)
            await all_of(await banks.delete_documents("atlas", ["bergen"]))
            await banks.update("atlas", [document("rome", "Rome has seven hills.", {"country": "it"})])
            before = [await hits(banks, "atlas", "capital hills", mode=mode) for mode in QueryMode]
        async with self.open(folder) as banks:
            assert [b.uuid for b in await all_of(await banks.list_banks())] == ["atlas"]
            assert [await hits(banks, "atlas", "capital hills", mode=mode) for mode in QueryMode] == before
            assert await found(banks, "atlas", k=9, filter={"eq": ["country", "it"]}) == ["rome"]
            assert (await contents(banks, "atlas", "bergen", "oslo")).keys() == {"oslo"}
            await banks.insert("atlas", [document("bergen", "Bergen again.")])
            assert await found(banks, "atlas", "Bergen", k=1) == ["bergen"]

    async def test_concurrent_writers_each_apply_whole(self, banks: MemoryBanks) -> None:
        """Of two that want the same id one succeeds, with all of its documents, and readers see no half of any."""

        async def write(n: int) -> bool:
            mine = [document(f"own{n}", f"Writer {n}."), document(f"shared{n % 4}", f"Shared, by {n}.")]
            try:
                await banks.insert("empty", mine)
            except ConflictError:
                return False
            return True

        async def read() -> None:
            for _ in range(20):
                owners = [h.text for h in await hits(banks, "empty", k=1000) if h.text.startswith("Writer")]
                shared = [h.text for h in await hits(banks, "empty", k=1000) if h.text.startswith("Shared")]
                assert len(shared) >= len(owners)

        done, _ = await asyncio.gather(asyncio.gather(*(write(n) for n in range(12))), read())
        winners = [n for n, is_done in enumerate(done) if is_done]
        assert len(winners) == 4
        assert len({n % 4 for n in winners}) == 4
        expected = {f"own{n}" for n in winners} | {f"shared{n}" for n in range(4)}
        assert set(await found(banks, "empty", k=1000)) == expected
        assert set(await found(banks, "empty", "writer shared by", k=1000)) == expected

    async def test_banks_do_not_see_each_other(self, banks: MemoryBanks) -> None:
        """The same ids in two banks are two documents."""
        await banks.create("second", "Second", [document("oslo", "Another Oslo, in Minnesota.")])
        assert await found(banks, "second", "Oslo capital rainy", k=10) == ["oslo"]
        await all_of(await banks.delete_documents("second", ["oslo"]))
        assert await found(banks, "second", "Oslo", k=10) == []
        assert await found(banks, "atlas", "Oslo", k=1) == ["oslo"]

"""How a contract is read off its methods, and what is refused at once."""

# An operation's body in its contract is its docstring.
# mypy: disable-error-code="empty-body"

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator
from typing import Annotated, Any

import pytest

import llama_stack.apis
from llama_stack.apis import APIS, DRAFT_APIS, Api, Operation, Shape, contract_of, get, operations, post
from llama_stack.apis.common import EXTENSION, Id, Items, Maybe, Message, Schema, ShieldConfig
from llama_stack.apis.models import Models
from llama_stack.apis.safety import RunShieldRequest, Safety
from llama_stack.errors import NotProvidedError
from tests.draft_schemas import DraftSchemas


class Letter(Schema):
    """What is sent."""

    to: Id
    stream: bool = False


class Chunk(Schema):
    """A piece of what comes back."""

    text: str


class Post(Api, name="post_office", routed_by="to"):
    """An API with an operation of every shape."""

    @abstractmethod
    async def helper(self) -> list[str]:
        """Not an operation: no HTTP."""

    @post("/post/send", creates=True)
    async def send(self, letter: Letter) -> None:
        """Answers nothing."""

    @post("/post/ask")
    async def ask(self, letter: Letter) -> Letter | AsyncIterator[Chunk]:
        """Answers whole or in chunks."""

    @get("/post/list")
    async def list_letters(self, to: Id, limit: int = 10) -> AsyncIterator[Letter]:
        """Answers lines."""

    @get("/post/watch")
    async def watch(self, to: Id, follow: Annotated[bool, EXTENSION] = False) -> Letter | AsyncIterator[Letter]:
        """Streams when a parameter says so."""

    @post("/post/burn", extension=True, resource="office")
    async def burn(self, office: Id, letters: Items[Id]) -> list[Id]:
        """Added later than the rest."""


def operation(name: str, api: type[Api] = Post) -> Operation:
    return next(found for found in operations(api) if found.name == name)


@pytest.mark.parametrize(
    ("name", "shape", "result", "chunk"),
    [
        ("send", Shape.VOID, None, None),
        ("ask", Shape.REPLY, Letter, Chunk),
        ("list_letters", Shape.LINES, Letter, None),
        ("watch", Shape.REPLY, Letter, Letter),
        ("burn", Shape.VALUE, list[Id], None),
    ],
)
def test_the_return_annotation_is_the_shape(name: str, shape: Shape, result: Any, chunk: Any) -> None:
    """The server, the client and the documents all ask this one question."""
    found = operation(name)
    assert (found.shape, found.result, found.chunk) == (shape, result, chunk)


def test_schemas_and_lists_are_bodies_and_all_else_is_a_query_parameter() -> None:
    """The signature is the schema: nobody says where a parameter travels."""
    burn = operation("burn")
    assert burn.body is not None
    assert burn.body.name == "letters"
    assert list(burn.query) == ["office"]
    listed = operation("list_letters")
    assert listed.body is None
    assert listed.query["to"].is_required
    assert listed.query["limit"].default == 10
    assert not listed.query["limit"].is_required
    assert operation("watch").query["follow"].is_extension


def test_operations_come_in_the_order_of_the_contract_and_helpers_are_none() -> None:
    """Documents and tables list them as the author wrote them."""
    assert [found.name for found in operations(Post)] == ["send", "ask", "list_letters", "watch", "burn"]


def test_the_resource_is_found_where_the_request_names_it() -> None:
    """Dispatch among several providers rests on it."""
    letter = Letter(to="anna")
    assert operation("send").resource_of({"letter": letter}) == "anna"
    assert operation("list_letters").resource_of({"to": "bert"}) == "bert"
    assert operation("burn").resource_of({"office": "north", "letters": []}) == "north"
    assert operation("list_models", Models).resource_of({}) is None
    request = RunShieldRequest(messages=[Message.user("x")], shield=ShieldConfig(shield_type="llama_guard", params={}))
    assert operation("run_shield", Safety).resource_of({"request": request}) == "llama_guard"


def test_a_stream_is_wanted_when_the_body_or_the_parameter_says_so() -> None:
    """Two forms of one reply; the request chooses."""
    assert operation("ask").wants_stream({"letter": Letter(to="a", stream=True)})
    assert not operation("ask").wants_stream({"letter": Letter(to="a")})
    assert operation("watch").wants_stream({"to": "a", "follow": True})
    assert not operation("watch").wants_stream({"to": "a"})
    assert not operation("send").wants_stream({"letter": Letter(to="a", stream=True)})
    assert operation("watch").stream_parameter == "follow"
    assert operation("ask").stream_parameter is None


class Branch(Post):
    """A provider written before ``burn`` existed."""

    async def helper(self) -> list[str]:
        return []

    async def send(self, letter: Letter) -> None:
        return None

    async def ask(self, letter: Letter) -> Letter | AsyncIterator[Chunk]:
        return letter

    async def list_letters(self, to: Id, limit: int = 10) -> AsyncIterator[Letter]:
        raise NotImplementedError

    async def watch(self, to: Id, follow: bool = False) -> Letter | AsyncIterator[Letter]:
        raise NotImplementedError


@pytest.mark.anyio
async def test_an_operation_added_later_answers_501_from_an_old_provider() -> None:
    """Interfaces only grow: a plugin of last year loads, and its users are told what it lacks."""
    with pytest.raises(NotProvidedError, match="'post_office' does not implement POST /post/burn"):
        await Branch().burn("north", [])


@pytest.mark.anyio
async def test_a_provider_beside_another_must_say_what_it_owns() -> None:
    """Dispatch would otherwise guess."""
    with pytest.raises(NotProvidedError, match="cannot run beside another"):
        await Branch().owns("anna")


def test_a_provider_that_lacks_an_operation_cannot_be_made() -> None:
    """The gap shows when the provider starts, not when a client calls."""

    class Unfinished(Post):
        """Implements nothing."""

    with pytest.raises(TypeError, match="ask"):
        Unfinished()  # type: ignore[abstract]


def test_a_providers_contract_is_the_class_that_was_declared() -> None:
    """A provider's own methods and paths add no operations."""
    assert contract_of(Branch) is Post
    assert operations(Branch) is operations(Post)
    with pytest.raises(TypeError, match="implements none"):
        contract_of(Api)


def test_a_contract_that_cannot_be_read_is_refused() -> None:
    """The author of an API learns it when it is read first, with the method's name."""

    class TwoBodies(Api, name="a"):
        @post("/a")
        async def send(self, letter: Letter, letters: list[Letter]) -> None:
            """Which of the two is the body?"""

    class BodyOfGet(Api, name="b"):
        @get("/b")
        async def read(self, letter: Letter) -> None:
            """GET has no body."""

    class NotAsync(Api, name="c"):
        @get("/c")  # type: ignore[type-var]
        def read(self) -> None:
            """The loop would block."""

    class NoType(Api, name="d"):
        @get("/d")
        async def read(self, what) -> None:  # type: ignore[no-untyped-def]
            """What is it?"""

    class NoResult(Api, name="e"):
        @get("/e")
        async def read(self):  # type: ignore[no-untyped-def]
            """What comes back?"""

    class Several(Api, name="f"):
        @get("/f")
        async def read(self, *ids: Id) -> None:
            """A name of its own, please."""

    class Odd(Api, name="g"):
        @get("/g")
        async def read(self, filter: dict[str, str]) -> None:
            """Neither a body nor a query parameter."""

    for api, complaint in [
        (TwoBodies, "two bodies: 'letter' and 'letters'"),
        (BodyOfGet, "GET carries no body"),
        (NotAsync, "async def"),
        (NoType, "parameter 'what' needs a type"),
        (NoResult, "does not say what it returns"),
        (Several, "parameter 'ids' needs a type and a name"),
        (Odd, "neither a schema or list"),
    ]:
        with pytest.raises(TypeError, match=complaint):
            operations(api)


def test_optional_query_parameters_are_scalars_too() -> None:
    """An id that may be left out is the usual filter of a list."""

    class Filtered(Api, name="h"):
        @get("/h")
        async def read(self, to: Maybe[Id] = None, limit: int | None = None) -> None:
            """Read."""

    assert list(operation("read", Filtered).query) == ["to", "limit"]


def test_the_core_brings_the_drafts_operations_and_no_path_twice() -> None:
    """24 operations in seven APIs, and extensions that never change them."""
    found = [found for api in DRAFT_APIS for found in operations(api)]
    assert len(DRAFT_APIS) == 7
    assert {o.key for o in found if not o.is_extension} == set(DraftSchemas().operations)
    keys = [o.key for api in APIS for o in operations(api)]
    assert len(keys) == len(set(keys))
    assert all(o.doc for api in APIS for o in operations(api))


def test_resources_of_the_core_are_named_by_the_requests() -> None:
    """Every operation on one resource can be dispatched; lists, generators of data and what takes the description of a
    dataset, which nobody need have registered, name none.
    """
    without = {o.key for api in APIS for o in operations(api) if o.resource is None}
    assert without == {
        "GET /memory_banks/get",
        "GET /agentic_system/list",
        "GET /datasets/list",
        "POST /datasets/read",
        "POST /datasets/hold",
        "POST /datasets/release",
        "GET /post_training/jobs",
        "GET /models/list",
        "POST /synthetic_data_generation/generate",
    }
    assert {o.key for api in APIS for o in operations(api) if o.creates} == {
        "POST /agentic_system/create",
        "POST /datasets/create",
        "POST /datasets/store",
        "POST /memory_banks/create",
        "POST /post_training/preference_optimize/",
        "POST /post_training/supervised_fine_tune/",
        "POST /post_training/train_reward_model",
    }


def test_every_parameter_and_reply_can_be_validated_and_written() -> None:
    """The adapters are built lazily; each must build."""
    for api in APIS:
        for found in operations(api):
            for parameter in [*found.query.values(), *([found.body] if found.body else [])]:
                assert parameter.adapter.core_schema
            if found.shape is not Shape.VOID:
                assert found.result_adapter.core_schema
            if found.chunk is not None:
                assert found.chunk_adapter.core_schema


def test_the_public_names_are_these() -> None:
    """Plugin authors import them; one that goes breaks a plugin, one that comes is a promise."""
    assert llama_stack.apis.__all__ == [
        "APIS",
        "DRAFT_APIS",
        "AgenticSystem",
        "Api",
        "Config",
        "Datasets",
        "Inference",
        "InnerProvider",
        "MemoryBanks",
        "Models",
        "NoConfig",
        "Operation",
        "Parameter",
        "PostTraining",
        "RewardScoring",
        "Safety",
        "ServedModel",
        "Shape",
        "SyntheticDataGeneration",
        "contract_of",
        "delete",
        "get",
        "operations",
        "post",
    ]
    assert all(hasattr(llama_stack.apis, name) for name in llama_stack.apis.__all__)

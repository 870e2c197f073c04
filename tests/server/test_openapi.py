"""The published documents against the draft's own file, and what may differ."""

# An operation's body in its contract is its docstring.
# mypy: disable-error-code="empty-body"

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import pytest
from fastapi import APIRouter
from fastapi.openapi.utils import get_openapi
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from llama_stack.apis import APIS, Api, Datasets, Inference, contract_of, operations, post
from llama_stack.apis.common import EXTENSION, Id, Maybe, Schema
from llama_stack.errors import AlreadyExistsError, FieldFault, InvalidRequestError, ModelNotFoundError, UnavailableError
from llama_stack.server.errors import problem
from llama_stack.server.openapi import draft_document, extension_document
from tests.draft_schemas import DraftSchemas, draft, read_overlaps_as_any_of

RETITLED = {"PostTrainingRLHFRequest": "Request to align a finetuned model."}
OURS = {"Problem", "ProblemError", "ProblemFault"}


def without_descriptions(part: Any, *, names: bool = False) -> Any:
    """A copy without the words: a ``description`` is dropped except where it is the name of a field."""
    if isinstance(part, dict):
        return {
            key: without_descriptions(value, names=key == "properties")
            for key, value in part.items()
            if names or key != "description"
        }
    return [without_descriptions(value) for value in part] if isinstance(part, list) else part


def schemas_in(part: Any) -> Iterator[dict[str, Any]]:
    if isinstance(part, dict):
        yield part
        for value in part.values():
            yield from schemas_in(value)
    elif isinstance(part, list):
        for value in part:
            yield from schemas_in(value)


def normalised_draft(document: dict[str, Any]) -> dict[str, Any]:
    """The draft's file after the rules of docs/openapi.md, each of which stands here once."""
    document = read_overlaps_as_any_of(without_descriptions(document))
    for schema in schemas_in(document):
        if schema.get("type") == "array":
            schema.setdefault("items", {})
    for name, title in RETITLED.items():
        document["components"]["schemas"][name]["title"] = title
    del document["security"]
    document["servers"] = [{"url": "/"}]
    return ordered(document)


def normalised_ours(document: dict[str, Any]) -> dict[str, Any]:
    """Our document without the answers to errors, for which the draft has no words."""
    document = without_descriptions(document)
    for item in document["paths"].values():
        for operation in item.values():
            del operation["responses"]["default"]
    for name in OURS:
        del document["components"]["schemas"][name]
    return ordered(document)


def ordered(document: dict[str, Any]) -> dict[str, Any]:
    """``required`` and ``tags`` are sets, so their order means nothing."""
    for schema in schemas_in(document):
        if isinstance(schema.get("required"), list):
            schema["required"] = sorted(schema["required"])
    document["tags"] = sorted(document["tags"], key=lambda tag: str(tag["name"]))
    return document


def differences(theirs: Any, ours: Any, at: str = "") -> list[str]:
    """Where two documents differ, as JSON pointers."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = []
        for key in sorted(theirs.keys() | ours.keys()):
            if key in theirs and key in ours:
                found += differences(theirs[key], ours[key], f"{at}/{key}")
            else:
                found.append(f"{at}/{key} only in {'the draft' if key in theirs else 'our document'}")
        return found
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        return [d for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) for d in differences(a, b, f"{at}/{i}")]
    return [] if theirs == ours and type(theirs) is type(ours) else [f"{at}: {theirs!r} became {ours!r}"]


def test_our_document_equals_the_draft_after_the_documented_rules() -> None:
    """Clients in the field were generated from the draft: every path, schema, enum, default and title must be there."""
    theirs = normalised_draft(draft())
    assert len(theirs["components"]["schemas"]) == 40
    assert sum(len(item) for item in theirs["paths"].values()) == 24
    assert differences(theirs, normalised_ours(draft_document())) == []


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        (
            lambda d: d["components"]["schemas"]["Message"]["properties"]["role"]["enum"].remove("tool"),
            "/components/schemas/Message/properties/role/enum",
        ),
        (
            lambda d: d["components"]["schemas"]["Dialog"]["required"].remove("message_history"),
            "/components/schemas/Dialog/required",
        ),
        (lambda d: d["paths"].pop("/datasets/get"), "/paths//datasets/get"),
        (
            lambda d: d["components"]["schemas"]["CompletionRequest"]["properties"]["max_tokens"].update(default=0.0),
            "/components/schemas/CompletionRequest/properties/max_tokens/default",
        ),
        (
            lambda d: d["components"]["schemas"].update(ToolCall={"type": "object"}),
            "/components/schemas/ToolCall",
        ),
        (
            lambda d: d["paths"]["/memory_bank/insert"]["post"]["parameters"][0].update(required=False),
            "/paths//memory_bank/insert/post/parameters/0/required",
        ),
        (
            lambda d: d["components"]["schemas"]["URL"].pop("pattern"),
            "/components/schemas/URL/pattern",
        ),
        (
            lambda d: d["components"]["schemas"]["Attachment"].update(additionalProperties=True),
            "/components/schemas/Attachment/additionalProperties",
        ),
    ],
)
def test_the_comparison_finds_a_change(change: Change, pointer: str) -> None:
    """A comparison that cannot fail would prove nothing."""
    ours = copy.deepcopy(draft_document())
    change(ours)
    found = differences(normalised_draft(draft()), normalised_ours(ours))
    assert len(found) == 1
    assert found[0].startswith(pointer)


@pytest.mark.parametrize("document", [draft_document(), extension_document(APIS)], ids=["draft", "extensions"])
def test_every_schema_is_valid_and_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    """A generator stops at the first dangling reference or misspelt keyword."""
    components = document["components"]["schemas"]
    for name, schema in components.items():
        Draft202012Validator.check_schema(schema)
        assert all(c.isalnum() or c in "._-" for c in name)
    for part in schemas_in(document):
        if isinstance(part.get("$ref"), str):
            assert part["$ref"].startswith("#/components/schemas/")
            assert part["$ref"].rpartition("/")[2] in components
        assert not {"x-draft", "x-inline", "x-any-of"} & part.keys()
    json.dumps(document, allow_nan=False)


def test_titles_of_components_are_unique() -> None:
    """openapi-python-client names a class by its title, and drops the second schema of the same title."""
    titles = [schema["title"] for schema in draft_document()["components"]["schemas"].values() if "title" in schema]
    assert len(titles) == len(set(titles))


def test_nothing_of_ours_is_in_the_drafts_document() -> None:
    """To a client of the draft we look like the draft: no extension, no limit that the draft does not state."""
    text = json.dumps(draft_document())
    for word in ("x-extension", "maxLength", "maxItems", "minimum", '"seed"', '"follow"', "/safety/", "/models/"):
        assert word not in text


def test_the_extension_document_holds_what_the_draft_lacks() -> None:
    """Further operations, fields and limits are documented too, apart from the draft's."""
    document = extension_document(APIS)
    listed = {f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item}
    extensions = {operation.key for api in APIS for operation in operations(api) if operation.is_extension}
    assert listed == extensions | {"GET /post_training/job/logs", "POST /memory_banks/create"}
    assert len(extensions) == 16
    schemas = document["components"]["schemas"]
    assert schemas["SamplingParams"]["properties"]["seed"]["x-extension"] is True
    assert schemas["SamplingParams"]["properties"]["temperature"]["maximum"] == 100
    assert schemas["CompletionRequest"]["properties"]["max_tokens"]["minimum"] == 0
    assert {"null"} & {field.get("type") for field in schemas["ServedModel"]["properties"].values()} == set()
    follow = next(p for p in document["paths"]["/post_training/job/logs"]["get"]["parameters"] if p["name"] == "follow")
    assert follow["required"] is False
    assert follow["schema"]["default"] is False
    assert "text/event-stream" in document["paths"]["/post_training/job/logs"]["get"]["responses"]["200"]["content"]


def test_every_operation_says_what_it_does() -> None:
    """The descriptions are the documentation that generated clients carry."""
    for document in (draft_document(), extension_document(APIS)):
        for item in document["paths"].values():
            for operation in item.values():
                assert operation["description"]


class Message(Schema):
    """A message of a plugin's own API, of the same name as ours."""

    body: Id
    note: Annotated[Maybe[Id], EXTENSION] = None


class Post(Api, name="post_office"):
    """An API that a plugin brings."""

    @post("/post_office/send")
    async def send(self, message: Message) -> Message:
        """Send a message."""


def test_a_plugins_api_is_published_among_the_extensions() -> None:
    """A plugin may bring an API, and its schema may have the name of one of ours."""
    document = extension_document([Inference, Post])
    sent = document["paths"]["/post_office/send"]["post"]
    reference = sent["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert set(document["components"]["schemas"][reference.rpartition("/")[2]]["properties"]) == {"body", "note"}
    assert "/post_office/send" not in draft_document()["paths"]


class Dialog(BaseModel):
    """A face's own model, of the same name as one of the draft's."""

    subject: str


def test_a_faces_routes_are_published_beside_schemas_of_the_same_name() -> None:
    """FastAPI writes a face's document by itself; its ``Dialog`` must not replace the draft's."""
    router = APIRouter()

    @router.post("/mail")
    def mail(dialog: Dialog) -> Dialog:
        return dialog

    face = get_openapi(title="Mail room", version="1", routes=router.routes)
    document = extension_document([Inference], [face, {"paths": {"/health/live": {"get": {"responses": {}}}}}])
    schemas = document["components"]["schemas"]
    assert set(schemas["Dialog"]["properties"]) == {"message", "message_history"}
    body = document["paths"]["/mail"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/Mail_room_Dialog"}
    assert set(schemas["Mail_room_Dialog"]["properties"]) == {"subject"}
    assert "/health/live" in document["paths"]


def test_a_face_that_has_gone_is_in_no_later_document() -> None:
    """What the contracts publish is worked out once, and each document is the caller's own."""
    face = {"paths": {"/mail": {}}, "components": {"schemas": {"Mail": {"type": "object"}}}}
    first, second = extension_document(APIS, [face]), extension_document(APIS)
    assert first["paths"].keys() - second["paths"].keys() == {"/mail"}
    assert first["components"]["schemas"].keys() - second["components"]["schemas"].keys() == {"Mail"}
    first["components"]["schemas"]["Dialog"].clear()
    assert extension_document(APIS) == second


def test_a_provider_class_is_published_by_its_contract() -> None:
    """The server knows the running providers; what is published is what they implement."""

    class Mine(Datasets):
        pass

    assert contract_of(Mine) is Datasets
    assert extension_document([Mine]) == extension_document([Datasets])


@pytest.mark.parametrize(
    "error",
    [
        ModelNotFoundError("tiny", ["small"]),
        InvalidRequestError(
            "2 fields are invalid",
            faults=[
                FieldFault("/max_tokens", "too_large", "at most 9", 9),
                FieldFault("/x", "unknown_key", "no such key"),
            ],
        ),
        AlreadyExistsError("dataset", "d1", param="uuid"),
        UnavailableError("later", retry_after_seconds=3),
        RuntimeError("our bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_errors_that_are_sent_are_the_errors_that_are_published(error: Exception) -> None:
    """The draft says nothing of errors; what we say of them must hold for each."""
    components = draft_document()["components"]
    judge = Draft202012Validator({"components": components, "$ref": "#/components/schemas/Problem"})
    document = problem(error, "r1")
    judge.validate(document)
    assert set(components["schemas"]["Problem"]["properties"]) >= document.keys() - {"existing_matches"}
    assert not judge.is_valid(document | {"status": "404"})


def test_read_to_the_letter_the_draft_refuses_every_builtin_tool() -> None:
    """The reason for rule G3, held against the draft's own text."""
    tool = draft()["components"]["schemas"]["ChatCompletionRequest"]["properties"]["available_tools"]["items"]
    name = tool["properties"]["tool_name"]
    assert not Draft202012Validator(name).is_valid("web_search")
    assert Draft202012Validator({"anyOf": name["oneOf"]}).is_valid("web_search")


def test_the_judge_of_replies_can_say_no() -> None:
    """Every test of replies relies on it."""
    judge = DraftSchemas()
    assert len(judge.operations) == 24
    whole = {"content": "Hi", "tool_calls": []}
    assert judge.reply_faults("POST /inference/chat_completion", whole) == []
    assert judge.reply_faults("POST /inference/chat_completion", whole | {"usage": 3})
    assert judge.reply_faults("POST /inference/chat_completion", {"content": "Hi"})
    assert judge.reply_faults("POST /inference/chat_completion", {"text_delta": "Hi"})
    assert judge.reply_faults("POST /inference/chat_completion", {"text_delta": "Hi"}, chunk=True) == []
    assert judge.reply_faults("DELETE /datasets/delete", {})
    document = {"uuid": "d", "content": "aGk=", "metadata": {}, "mime_type": "text/plain"}
    assert judge.reply_faults("POST /memory_bank/get", document) == []
    assert judge.reply_faults("POST /memory_bank/get", document | {"content": "a*"})
    status = {"job_uuid": "j", "status": "running", "checkpoints": []}
    assert judge.reply_faults("GET /post_training/job/status", status | {"started_at": "2024-07-23T10:00:00Z"}) == []
    assert judge.reply_faults("GET /post_training/job/status", status | {"started_at": "2024-07-23T10:00:00"})

"""The conformance kit: our own providers pass it, and each of many seeded defects is caught by it."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from llama_stack.apis import Api, Datasets, Inference, Safety, ServedModel
from llama_stack.apis.common import Message, StopReason, ToolCall
from llama_stack.apis.datasets import (
    ColumnKind,
    CreateDatasetRequest,
    Dataset,
    HoldDatasetRequest,
    NamedDataset,
    ReadDatasetRequest,
    ReleaseDatasetsRequest,
    StoreDatasetRequest,
)
from llama_stack.apis.inference import (
    BatchChatCompletionRequest,
    BatchCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    CompletionResponseStreamChunk,
)
from llama_stack.apis.models import ModelKind
from llama_stack.apis.safety import RunShieldRequest, RunShieldResponse, Violation
from llama_stack.errors import AlreadyExistsError, ConflictError, InvalidRequestError, NotFoundError
from llama_stack.plugins import ProviderSpec, hookimpl
from llama_stack.storage import Database
from llama_stack.testing.conformance import Outcome, Verdict, checks_for, conformance, run_check
from llama_stack.testing.conformance.in_process import Target, serving_target
from llama_stack.text_inference import TextInference

MODEL = "honest"


class Honest(TextInference):
    """A model without a fault: it repeats what it is told, word by word, and calls a tool that it is given."""

    names: ClassVar[Sequence[str]] = (MODEL,)

    async def pieces(
        self, messages: Sequence[Message], request: ChatCompletionRequest | CompletionRequest
    ) -> AsyncGenerator[str | ToolCall, None]:
        for word in str(messages[-1].content).split():
            await asyncio.sleep(0)
            yield f"{word} "
        for tool in getattr(request, "available_tools", ()):
            yield ToolCall(tool_name=tool.tool_name, arguments={})


class ForgetsTheModel(Honest):
    """Answers for any model."""

    def _check(self, model: str) -> None:
        pass


class RefusesTooLate(Honest):
    """Finds out in the middle of a stream that it does not serve the model."""

    async def chat_completion(self, request: ChatCompletionRequest) -> Any:
        if request.stream and request.model != MODEL:
            return self._late(request)
        return await super().chat_completion(request)

    async def _late(self, request: ChatCompletionRequest) -> AsyncIterator[Any]:
        served = request.model_copy(update={"model": MODEL})
        async for chunk in await super().chat_completion(served):  # type: ignore[union-attr]
            yield chunk


class Loses(Honest):
    """Its stream lacks a word."""

    async def completion(self, request: CompletionRequest) -> Any:
        answer = await super().completion(request)
        return _without_first(answer) if request.stream else answer


class Doubles(Honest):
    """Its streamed chat says a word twice."""

    async def chat_completion(self, request: ChatCompletionRequest) -> Any:
        answer = await super().chat_completion(request)
        return _first_twice(answer) if request.stream else answer


class StopsEarly(Honest):
    """Each chunk of its stream says that it is the last."""

    async def completion(self, request: CompletionRequest) -> Any:
        answer = await super().completion(request)
        return _all_final(answer) if request.stream else answer


class NeverStops(Honest):
    """Its stream has no last chunk."""

    async def completion(self, request: CompletionRequest) -> Any:
        answer = await super().completion(request)
        return _without_last(answer) if request.stream else answer


class StopsOtherwise(Honest):
    """Its stream ends for another reason than its whole answer."""

    async def completion(self, request: CompletionRequest) -> Any:
        answer = await super().completion(request)
        if request.stream:
            return answer
        assert isinstance(answer, CompletionResponse)
        return CompletionResponse(content=answer.content, stop_reason=StopReason.MAX_TOKENS)


class LosesCalls(Honest):
    """Its stream has no calls."""

    async def chat_completion(self, request: ChatCompletionRequest) -> Any:
        answer = await super().chat_completion(request)
        return _without_calls(answer) if request.stream else answer


class Shuffles(Honest):
    """Its batch comes in another order."""

    async def batch_completion(self, request: BatchCompletionRequest) -> AsyncIterator[CompletionResponse]:
        turned = request.model_copy(update={"content_batch": request.content_batch[::-1]})
        return await super().batch_completion(turned)


class ShufflesDialogs(Honest):
    """Its batch of dialogs comes in another order."""

    async def batch_chat_completion(self, request: BatchChatCompletionRequest) -> AsyncIterator[ChatCompletionResponse]:
        turned = request.model_copy(update={"batch_dialogs": request.batch_dialogs[::-1]})
        return await super().batch_chat_completion(turned)


class DropsTheLastLine(Honest):
    """Its batch lacks a line."""

    async def batch_completion(self, request: BatchCompletionRequest) -> AsyncIterator[CompletionResponse]:
        return _without_last(await super().batch_completion(request))


class InventsALine(Honest):
    """Its empty batch has a line."""

    async def batch_completion(self, request: BatchCompletionRequest) -> AsyncIterator[CompletionResponse]:
        if not request.content_batch:
            request = request.model_copy(update={"content_batch": ["nothing"]})
        return await super().batch_completion(request)


class IgnoresMaxTokens(Honest):
    """Cuts an answer and says that it has finished."""

    async def completion(self, request: CompletionRequest) -> Any:
        answer = await super().completion(request)
        if isinstance(answer, CompletionResponse) and answer.stop_reason is StopReason.MAX_TOKENS:
            return CompletionResponse(content=answer.content, stop_reason=StopReason.FINISHED_OK)
        return answer


class AnswersOtherwiseWhenCut(Honest):
    """Its short answer is no beginning of the long one."""

    async def completion(self, request: CompletionRequest) -> Any:
        if request.max_tokens == 1 and not request.stream:
            return CompletionResponse(content="Well", stop_reason=StopReason.MAX_TOKENS)
        return await super().completion(request)


class GivesLogprobsUnasked(Honest):
    """Adds what nobody asked for, which a client of the draft refuses."""

    async def completion(self, request: CompletionRequest) -> Any:
        answer = await super().completion(request)
        if isinstance(answer, CompletionResponse):
            return answer.model_copy(update={"logprobs": {"tokens": [], "token_logprobs": []}})
        return answer


class GivesOddLogprobs(Honest):
    """Its lists do not fit each other."""

    async def completion(self, request: CompletionRequest) -> Any:
        answer = await super().completion(request)
        if isinstance(answer, CompletionResponse) and request.logprobs:
            return answer.model_copy(update={"logprobs": {"tokens": ["a", "b"], "token_logprobs": [-0.5]}})
        return answer


class Rolls(Honest):
    """Its greedy answers differ from time to time."""

    async def pieces(
        self, messages: Sequence[Message], request: ChatCompletionRequest | CompletionRequest
    ) -> AsyncGenerator[str | ToolCall, None]:
        yield str(random.random())


class Mixes(Honest):
    """Beside others it answers what another asked."""

    last = ""

    async def pieces(
        self, messages: Sequence[Message], request: ChatCompletionRequest | CompletionRequest
    ) -> AsyncGenerator[str | ToolCall, None]:
        self.last = str(messages[-1].content)
        await asyncio.sleep(0.02)
        yield self.last


class GoesOnAlone(Honest):
    """Works in a task of its own, which goes on when its client has left."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    async def pieces(
        self, messages: Sequence[Message], request: ChatCompletionRequest | CompletionRequest
    ) -> AsyncGenerator[str | ToolCall, None]:
        words: asyncio.Queue[str] = asyncio.Queue()

        async def work() -> None:
            for word in str(messages[-1].content).split():
                await words.put(f"{word} ")
            await asyncio.sleep(60 if request.max_tokens == 512 else 0)

        self.tasks.append(asyncio.create_task(work()))
        for _ in str(messages[-1].content).split():
            yield await words.get()
            await asyncio.sleep(0.2 if request.max_tokens == 512 else 0)


class SwallowsItsError(Honest):
    """Fails in silence: an empty answer where it broke."""

    async def batch_completion(self, request: BatchCompletionRequest) -> AsyncIterator[CompletionResponse]:
        async def lines() -> AsyncIterator[CompletionResponse]:
            for content in request.content_batch:
                try:
                    assert "Norway" not in str(content)
                    whole = await self.completion(CompletionRequest(content=content, model=request.model))
                    assert isinstance(whole, CompletionResponse)
                    yield whole
                except AssertionError:
                    yield CompletionResponse(content="", stop_reason=StopReason.FINISHED_OK)

        return lines()


class Crashes(Honest):
    """Raises what has no name."""

    async def completion(self, request: CompletionRequest) -> Any:
        raise ZeroDivisionError("oops")


class ListsTwice(Honest):
    """Its models have one name."""

    async def models(self) -> list[ServedModel]:
        return [ServedModel(model=MODEL, kind=ModelKind.LLM)] * 2


class ListsALostAlias(Honest):
    """Its alias stands for a model that is not there."""

    async def models(self) -> list[ServedModel]:
        return [*await super().models(), ServedModel(model="nick", kind=ModelKind.LLM, alias_of="gone")]


class Words(Safety):
    """A shield without a fault."""

    async def shields(self) -> list[str]:
        return ["guard"]

    async def run_shield(self, request: RunShieldRequest) -> RunShieldResponse:
        if request.shield.shield_type != "guard":
            raise NotFoundError(f"no shield {request.shield.shield_type!r}", param="shield_type")
        if request.shield.params:
            raise InvalidRequestError("this shield has no parameters", param="params")
        if request.messages and "forbidden" in str(request.messages[-1].content):
            return RunShieldResponse(violation=Violation(violation_type="word", details="forbidden"))
        return RunShieldResponse()


class PassesUnknownShields(Words):
    """Has no objection where it should not have been asked."""

    async def owns(self, resource: str) -> bool:
        return True

    async def run_shield(self, request: RunShieldRequest) -> RunShieldResponse:
        return RunShieldResponse()


class CannotDoWithoutMessages(Words):
    """Takes it for granted that there is a message."""

    async def run_shield(self, request: RunShieldRequest) -> RunShieldResponse:
        str(request.messages[-1].content)
        return await super().run_shield(request)


class Wavers(Words):
    """Objects now and then."""

    calls = 0

    async def run_shield(self, request: RunShieldRequest) -> RunShieldResponse:
        self.calls += 1
        if self.calls % 2:
            return RunShieldResponse(violation=Violation(violation_type="odd", details="odd"))
        return await super().run_shield(request)


class Shelf(Datasets):
    """Datasets without a fault, kept in the store of the stack."""

    def __init__(self, kept: dict[str, Dataset]) -> None:
        self.kept = kept

    async def create_dataset(self, request: CreateDatasetRequest) -> None:
        if self.kept.setdefault(request.uuid, request.dataset) != request.dataset:
            raise AlreadyExistsError("dataset", request.uuid, param="uuid")

    async def get_dataset(self, dataset_id: str) -> Dataset:
        if dataset_id not in self.kept:
            raise NotFoundError(f"no dataset {dataset_id!r}", param="dataset_id")
        return self.kept[dataset_id]

    async def delete_dataset(self, dataset_id: str) -> None:
        await self.get_dataset(dataset_id)
        del self.kept[dataset_id]

    async def list_datasets(self) -> AsyncIterator[NamedDataset]:
        async def each() -> AsyncIterator[NamedDataset]:
            for uuid, dataset in list(self.kept.items()):
                yield NamedDataset(uuid=uuid, dataset=dataset)

        return each()


class Overwrites(Shelf):
    """Takes a second dataset of one id for the first."""

    async def create_dataset(self, request: CreateDatasetRequest) -> None:
        self.kept[request.uuid] = request.dataset


class RefusesRepeats(Shelf):
    """Takes a repeated request for another one."""

    async def create_dataset(self, request: CreateDatasetRequest) -> None:
        if request.uuid in self.kept:
            raise AlreadyExistsError("dataset", request.uuid, param="uuid")
        await super().create_dataset(request)


class ChecksThenActs(Shelf):
    """Looks first and creates later: of two at once both succeed."""

    async def create_dataset(self, request: CreateDatasetRequest) -> None:
        other = self.kept.get(request.uuid)
        await asyncio.sleep(0.05)
        if other not in (None, request.dataset):
            raise AlreadyExistsError("dataset", request.uuid, param="uuid")
        self.kept[request.uuid] = request.dataset


class DeletesNothing(Shelf):
    """Says that it did."""

    async def delete_dataset(self, dataset_id: str) -> None:
        await self.get_dataset(dataset_id)


class DropsMetadata(Shelf):
    """Keeps less than it was given."""

    async def get_dataset(self, dataset_id: str) -> Dataset:
        return (await super().get_dataset(dataset_id)).model_copy(update={"metadata": {}})


async def _without_first(items: Any) -> AsyncIterator[Any]:
    async for number, item in _counted(items):
        if number:
            yield item


async def _first_twice(items: Any) -> AsyncIterator[Any]:
    async for number, item in _counted(items):
        yield item
        if not number:
            yield item


async def _all_final(items: Any) -> AsyncIterator[Any]:
    async for item in items:
        yield CompletionResponseStreamChunk(text_delta=item.text_delta, stop_reason=StopReason.FINISHED_OK)


async def _without_last(items: Any) -> AsyncIterator[Any]:
    held: list[Any] = []
    async for item in items:
        for earlier in held:
            yield earlier
        held = [item]


async def _without_calls(items: Any) -> AsyncIterator[Any]:
    async for item in items:
        if item.tool_call is None:
            yield item


class Library(Shelf):
    """A shelf with the extensions, for rows in ``data:`` URLs."""

    held: ClassVar[list[HoldDatasetRequest]] = []

    async def read(self, request: ReadDatasetRequest) -> AsyncIterator[dict[str, Any]]:
        lines = base64.b64decode(request.dataset.content_url.partition(",")[2]).splitlines()
        limit = len(lines) if request.limit is None else request.limit
        return self.rows([json.loads(line) for line in lines][request.offset :][:limit], request.dataset.columns)

    async def rows(self, rows: list[dict[str, Any]], columns: dict[str, ColumnKind]) -> AsyncIterator[dict[str, Any]]:
        for number, row in enumerate(rows, 1):
            for column in sorted(columns.keys() ^ row.keys()):
                raise InvalidRequestError(f"row {number}, column {column!r}: not in both")
            for column, kind in columns.items():
                if kind is ColumnKind.NUMBER and not isinstance(row[column], float):
                    raise InvalidRequestError(f"row {number}, column {column!r}: no number")
            yield row

    async def store(self, request: StoreDatasetRequest) -> Dataset:
        lines = "".join(json.dumps(row) + "\n" for row in request.rows)
        url = "data:application/jsonl;base64," + base64.b64encode(lines.encode()).decode()
        dataset = Dataset(columns=request.columns, content_url=url, metadata=request.metadata)
        await self.create_dataset(CreateDatasetRequest(uuid=request.uuid, dataset=dataset))
        return dataset

    async def hold(self, request: HoldDatasetRequest) -> None:
        self.held.append(request)

    async def release(self, request: ReleaseDatasetsRequest) -> None:
        self.held[:] = [one for one in self.held if one.user != request.user]

    async def delete_dataset(self, dataset_id: str) -> None:
        dataset = await self.get_dataset(dataset_id)
        for one in self.held:
            if one.dataset == dataset:
                raise ConflictError(f"dataset {dataset_id!r} is in use by {one.user!r}")
        await super().delete_dataset(dataset_id)


class ReadsAll(Library):
    """Overlooks which rows were asked for."""

    async def read(self, request: ReadDatasetRequest) -> AsyncIterator[dict[str, Any]]:
        return await super().read(request.model_copy(update={"offset": 0, "limit": None}))


class ReadsUnchecked(Library):
    """Gives rows whatever the columns say."""

    async def rows(self, rows: list[dict[str, Any]], columns: dict[str, ColumnKind]) -> AsyncIterator[dict[str, Any]]:
        for row in rows:
            yield row


class StoresStrings(Library):
    """Makes text of every cell."""

    async def store(self, request: StoreDatasetRequest) -> Dataset:
        rows = [{column: str(cell) for column, cell in row.items()} for row in request.rows]
        return await super().store(request.model_copy(update={"rows": rows}))


class ForgetsHolds(Library):
    """Deletes what somebody needs."""

    async def hold(self, request: HoldDatasetRequest) -> None:
        self.held[:] = []


async def _counted(items: AsyncIterator[Any]) -> AsyncIterator[tuple[int, Any]]:
    number = 0
    async for item in items:
        yield number, item
        number += 1


def plugin(api: type[Api], make: Any, *, leak: str = "") -> SimpleNamespace:
    """A plugin of one provider, ``guard``, which may leave something behind when it is stopped."""
    kept: dict[str, Any] = {}  # outlives a restart, as a database does
    left: list[Any] = []

    @asynccontextmanager
    async def start(database: Database) -> AsyncIterator[Api]:
        if leak == "a file":
            left.append(open("/dev/null"))  # noqa: SIM115  # which is the defect
        if leak == "a thread":
            left.append(threading.Event())
            threading.Thread(target=left[-1].wait).start()
        if leak == "a task":
            left.append(asyncio.create_task(asyncio.sleep(60)))
        yield make() if api is not Datasets else make({} if leak == "its rows" else kept)

    start.__annotations__ = {"database": Database, "return": AsyncIterator[api]}  # type: ignore[valid-type]
    spec = ProviderSpec(api=api, name="guard", start=start)

    def release() -> None:
        for thing in left:
            thing.set() if isinstance(thing, threading.Event) else getattr(thing, "close", lambda: None)()

    declare = hookimpl(specname="llama_stack_providers")(lambda: [spec])
    return SimpleNamespace(llama_stack_providers=declare, release=release)


DEFECTS: dict[str, tuple[type[Api], Any, str, set[str]]] = {
    **{
        defect.__name__: (Inference, defect, "", caught)
        for defect, caught in (
            (ForgetsTheModel, {"a_model_that_is_not_served_is_404"}),
            (RefusesTooLate, {"a_model_that_is_not_served_is_404"}),
            (Loses, {"a_streamed_completion_is_the_whole_one"}),
            (Doubles, {"a_streamed_answer_is_the_whole_one"}),
            (StopsEarly, {"a_streamed_completion_is_the_whole_one"}),
            (NeverStops, {"a_streamed_completion_is_the_whole_one"}),
            (StopsOtherwise, {"a_streamed_completion_is_the_whole_one"}),
            (LosesCalls, {"streamed_calls_are_the_whole_ones"}),
            (Shuffles, {"a_batch_keeps_its_order"}),
            (ShufflesDialogs, {"a_batch_of_dialogs_keeps_its_order"}),
            (DropsTheLastLine, {"a_batch_keeps_its_order"}),
            (InventsALine, {"an_empty_batch_has_no_lines"}),
            (IgnoresMaxTokens, {"max_tokens_cuts_an_answer"}),
            (AnswersOtherwiseWhenCut, {"max_tokens_cuts_an_answer"}),
            (GivesLogprobsUnasked, {"logprobs_come_when_asked_for"}),
            (GivesOddLogprobs, {"logprobs_come_when_asked_for"}),
            (Rolls, {"greedy_answers_repeat"}),
            (Mixes, {"requests_at_once_are_answered_as_alone"}),
            (GoesOnAlone, {"a_client_that_leaves_a_stream_stops_the_work"}),
            (SwallowsItsError, {"a_batch_keeps_its_order"}),
            (Crashes, {"a_text_is_continued"}),
            (ListsTwice, {"models_are_listed_once_each"}),
            (ListsALostAlias, {"models_are_listed_once_each"}),
        )
    },
    **{
        f"leaves {leak}": (Inference, Honest, leak, {"it_starts_and_stops_without_leaving_anything"})
        for leak in ("a file", "a thread", "a task")
    },
    "PassesUnknownShields": (Safety, PassesUnknownShields, "", {"an_unknown_shield_is_404"}),
    "CannotDoWithoutMessages": (Safety, CannotDoWithoutMessages, "", {"no_messages_are_no_crash"}),
    "Wavers": (Safety, Wavers, "", {"the_same_message_is_judged_the_same"}),
    "Overwrites": (Datasets, Overwrites, "", {"creating_again_succeeds_with_the_same_request_alone"}),
    "RefusesRepeats": (Datasets, RefusesRepeats, "", {"creating_again_succeeds_with_the_same_request_alone"}),
    "ChecksThenActs": (Datasets, ChecksThenActs, "", {"of_two_at_once_one_creates"}),
    "DeletesNothing": (Datasets, DeletesNothing, "", {"a_dataset_is_listed_until_it_is_deleted"}),
    "ReadsAll": (Datasets, ReadsAll, "", {"rows_come_in_their_order"}),
    "ReadsUnchecked": (Datasets, ReadsUnchecked, "", {"a_row_that_does_not_fit_is_named"}),
    "StoresStrings": (Datasets, StoresStrings, "", {"stored_rows_come_back"}),
    "ForgetsHolds": (Datasets, ForgetsHolds, "", {"a_dataset_in_use_is_not_deleted"}),
    "DropsMetadata": (Datasets, DropsMetadata, "", {"a_dataset_comes_back_as_it_was_created"}),
    "forgets its rows": (Datasets, Shelf, "its rows", {"datasets_outlive_a_restart"}),
}
"""Each defect, and the checks that must catch it; others may too."""


def failed(api: type[Api], made: Any, names: set[str] | None = None) -> Iterator[Outcome]:
    """The checks that fail for a provider; ``names`` narrows them."""
    target = Target(api.name, "guard", plugins=(made,))
    with serving_target(target) as (thread, subject):
        for found in checks_for(api):
            if names is None or found.name.partition(".")[2] in names:
                outcome = thread.run(run_check(found, subject))
                if outcome.verdict is Verdict.FAILED:
                    yield outcome


@pytest.mark.parametrize(
    ("api", "make"), [(Inference, Honest), (Safety, Words), (Datasets, Shelf), (Datasets, Library)]
)
def test_a_provider_without_a_fault_passes_every_check(api: type[Api], make: Any) -> None:
    """A kit that finds fault with what is right is switched off."""
    assert [(outcome.check.name, outcome.reason) for outcome in failed(api, plugin(api, make))] == []


def test_there_are_at_least_25_defects() -> None:
    """Each is of another kind."""
    assert len(DEFECTS) >= 25


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_is_caught(defect: str) -> None:
    """By the check whose rule it breaks, with a reason for the provider's author."""
    api, make, leak, caught = DEFECTS[defect]
    made = plugin(api, make, leak=leak)
    try:
        outcomes = list(failed(api, made, caught))
    finally:
        made.release()
    assert {outcome.check.name.partition(".")[2] for outcome in outcomes} == caught
    assert all(outcome.reason for outcome in outcomes)


TINY = {"models": {"tiny": {"checkpoint": "builtin:tiny", "cache_tokens": 8192}}, "aliases": {"llama3_8b": "tiny"}}
STUB = {"inference": [{"provider": "stub"}]}

test_the_stub_conforms = conformance("inference", "stub", config={"models": ["stub", "llama3_8b_chat"]})
test_meta_reference_conforms = conformance("inference", "meta-reference", config=TINY)
test_embeddings_conform = conformance("inference", "embeddings")
test_sqlite_banks_conform = conformance("memory_banks", "sqlite")
test_prompt_guard_conforms = conformance("safety", "prompt_guard")
test_code_guard_conforms = conformance("safety", "code_guard")
test_agents_conform = conformance(
    "agentic_system",
    "agents",
    beside=STUB | {"memory_banks": [{"provider": "sqlite"}], "safety": [{"provider": "prompt_guard"}]},
)


def test_a_folder_of_files_is_held_to_the_same_checks(tmp_path: Path) -> None:
    """A plugin of one file passes the kit as an installed one does."""
    (tmp_path / "echo.py").write_text(
        "from llama_stack.plugins import provides\n"
        "from llama_stack.text_inference import TextInference\n\n\n"
        "class Echo(TextInference):\n"
        "    names = ('echo',)\n\n"
        "    async def pieces(self, messages, request):\n"
        "        yield str(messages[-1].content)\n\n\n"
        "llama_stack_providers = provides('echo', Echo)\n"
    )
    with serving_target(Target("inference", "echo", plugins_dir=tmp_path)) as (thread, subject):
        outcomes = [thread.run(run_check(found, subject)) for found in checks_for(Inference)]
    assert [o.check.name for o in outcomes if o.verdict is Verdict.FAILED] == []

"""The Datasets API: name the data that training and evaluation read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from pydantic import Field

from .common import URL, Choice, Id, Items, JsonObject, Label, Maybe, Schema
from .contract import Api, delete, get, post


class ColumnKind(Choice):
    """What the cells of a column hold."""

    DIALOG = "dialog"
    TEXT = "text"
    MEDIA = "media"
    NUMBER = "number"
    JSON = "json"


Columns = Annotated[dict[Label, ColumnKind], Field(max_length=1_000)]
"""The columns of a dataset, by name, and the kind of each."""


class Dataset(Schema, title="Dataset to be used for training or evaluating language models."):
    """Rows at a URL (JSON lines, CSV or Parquet), and the kind of each column."""

    columns: Columns
    content_url: URL
    metadata: JsonObject


class CreateDatasetRequest(Schema, title="Request to create a dataset."):
    """Register a dataset under an id."""

    uuid: Id
    dataset: Dataset


class NamedDataset(Schema):
    """A dataset with its id."""

    uuid: Id
    dataset: Dataset


class ReadDatasetRequest(Schema):
    """Read the rows of a dataset, registered or not: all of them, or ``limit`` of them from row ``offset`` on."""

    dataset: Dataset
    offset: int = Field(default=0, ge=0, lt=2**63)
    """How many rows to leave out at the beginning."""
    limit: Maybe[Annotated[int, Field(ge=0, lt=2**63)]] = None
    """The most rows to read."""


class StoreDatasetRequest(Schema):
    """Register a dataset whose rows the stack keeps itself."""

    uuid: Id
    columns: Columns
    rows: Items[JsonObject]
    metadata: JsonObject = Field(default_factory=dict)


class HoldDatasetRequest(Schema):
    """Keep a dataset from being deleted while ``user``, such as a job, needs it."""

    user: Id
    """Who needs it; a name that means something to whoever is refused because of it."""
    dataset: Dataset


class ReleaseDatasetsRequest(Schema):
    """Give back all that ``user`` holds."""

    user: Id


class Datasets(Api, name="datasets", routed_by="dataset_id"):
    """Datasets by id. Content is read when it is used, and checked against the columns then."""

    @post("/datasets/create", resource="uuid", creates=True)
    async def create_dataset(self, request: CreateDatasetRequest) -> None:
        """Register a dataset; the same again is a success, another of that id raises ``AlreadyExistsError``."""

    @get("/datasets/get")
    async def get_dataset(self, dataset_id: Id) -> Dataset:
        """The dataset of that id; raises ``NotFoundError``."""

    @delete("/datasets/delete")
    async def delete_dataset(self, dataset_id: Id) -> None:
        """Forget a dataset; raises ``NotFoundError``, and ``ConflictError`` while a job uses it."""

    @get("/datasets/list", extension=True)
    async def list_datasets(self) -> AsyncIterator[NamedDataset]:
        """All datasets."""

    @post("/datasets/read", extension=True)
    async def read(self, request: ReadDatasetRequest) -> AsyncIterator[JsonObject]:
        """The rows of a dataset in their order, each with exactly the declared columns, as they are read and checked.

        A ``dialog`` cell is a list of messages, a ``text`` cell a string, a ``media`` cell a URL or an attachment, a
        ``number`` cell a number, a ``json`` cell any value. Raises ``InvalidRequestError`` that names the row (from 1)
        and the column that is not so, ``UnreadableDocumentError`` for content that is not what its name says, and what
        the fetching of a URL raises: ``UrlNotAllowedError``, ``UpstreamError``, ``DeadlineExceededError``.
        """

    @post("/datasets/store", extension=True, resource="uuid", creates=True)
    async def store(self, request: StoreDatasetRequest) -> Dataset:
        """Register a dataset of these rows, which are checked and kept by the stack; answers with its description.

        The same again is a success, another of that id raises ``AlreadyExistsError``; a row that does not fit the
        columns raises ``InvalidRequestError``.
        """

    @post("/datasets/hold", extension=True)
    async def hold(self, request: HoldDatasetRequest) -> None:
        """Keep a dataset until ``release``, also over a restart; deleting one described so raises ``ConflictError``.

        A user may hold several datasets, and the same one again.
        """

    @post("/datasets/release", extension=True)
    async def release(self, request: ReleaseDatasetsRequest) -> None:
        """Give back all that a user holds; holding nothing is a success."""

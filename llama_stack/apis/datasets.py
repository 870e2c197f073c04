"""The Datasets API: name the data that training and evaluation read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from pydantic import Field

from .common import URL, Choice, Id, JsonObject, Label, Schema
from .contract import Api, delete, get, post


class ColumnKind(Choice):
    """What the cells of a column hold."""

    DIALOG = "dialog"
    TEXT = "text"
    MEDIA = "media"
    NUMBER = "number"
    JSON = "json"


class Dataset(Schema, title="Dataset to be used for training or evaluating language models."):
    """Rows at a URL (JSON lines, CSV or Parquet), and the kind of each column."""

    columns: Annotated[dict[Label, ColumnKind], Field(max_length=1_000)]
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

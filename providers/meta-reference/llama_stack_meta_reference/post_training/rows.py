"""The rows of a job's datasets, written to its folder one by one: a dataset may be larger than memory."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_stack.apis import Datasets
from llama_stack.apis.datasets import ColumnKind, Dataset, ReadDatasetRequest
from llama_stack.errors import FieldFault, InvalidRequestError, StorageFullError

from .jobs import Kind

PREFERENCE_COLUMNS = ("prompt", "chosen", "rejected")
_WRITE_BYTES = 1 << 20


def column_faults(dataset: Dataset, kind: Kind, pointer: str) -> list[FieldFault]:
    """What training of this kind lacks among the columns of a dataset."""
    try:
        _columns(dataset, kind)
    except InvalidRequestError as error:
        return [FieldFault(f"{pointer}/columns", "columns", error.detail)]
    return []


def _columns(dataset: Dataset, kind: Kind) -> dict[str, str]:
    """Each column that training reads, and what it is called in the trainer's rows. Raises ``InvalidRequestError``."""
    dialogs = [name for name, of in dataset.columns.items() if of is ColumnKind.DIALOG]
    if kind != "sft":
        missing = [name for name in PREFERENCE_COLUMNS if name not in dialogs]
        if missing:
            raise InvalidRequestError(
                f"preferences are the dialog columns prompt, chosen and rejected; missing: {', '.join(missing)}"
            )
        return {name: name for name in PREFERENCE_COLUMNS}
    texts = [name for name, of in dataset.columns.items() if of is ColumnKind.TEXT]
    for called, found in (("dialog", dialogs), ("text", texts)):
        if len(found) == 1:
            return {found[0]: called}
        if len(found) > 1:
            raise InvalidRequestError(
                f"fine-tuning reads one {called} column, and there are {len(found)}: {', '.join(found)}"
            )
    raise InvalidRequestError(
        "fine-tuning reads one dialog column or, where there is none, one text column; neither is there"
    )


async def check_first(datasets: Datasets, dataset: Dataset) -> None:
    """Read the first row, so that what cannot be read at all is refused before a job waits for it.

    Raises what ``Datasets.read`` raises.
    """
    async for _ in await datasets.read(ReadDatasetRequest(dataset=dataset, limit=1)):
        return


async def write_rows(datasets: Datasets, dataset: Dataset, kind: Kind, file: Path) -> None:
    """Write the rows as the trainer reads them. The file is there whole and durable, or not at all.

    A file that is there is left as it is. Raises what ``Datasets.read`` raises, and ``StorageFullError``.
    """
    if await asyncio.to_thread(file.exists):
        return
    columns = _columns(dataset, kind)
    incoming = file.with_suffix(".incoming")
    lines: list[bytes] = []
    size = 0
    try:
        await asyncio.to_thread(incoming.write_bytes, b"")
        rows = await datasets.read(ReadDatasetRequest(dataset=dataset))
        async for row in rows:
            lines.append(_line(row, columns))
            size += len(lines[-1])
            if size > _WRITE_BYTES:
                await asyncio.to_thread(_append, incoming, lines)
                lines, size = [], 0
        await asyncio.to_thread(_append, incoming, lines)
        await asyncio.to_thread(_keep, incoming, file)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError("there is no room for the rows of the dataset") from error
        raise


def _line(row: dict[str, Any], columns: dict[str, str]) -> bytes:
    return json.dumps({called: row[name] for name, called in columns.items()}).encode() + b"\n"


def _append(file: Path, lines: Iterable[bytes]) -> None:
    with file.open("ab") as out:
        out.writelines(lines)


def _keep(incoming: Path, file: Path) -> None:
    with incoming.open("rb") as written:
        os.fsync(written.fileno())
    incoming.replace(file)
    parent = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)

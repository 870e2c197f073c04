"""The jobs in the store: each a row that is there before its request is answered, and tells what a restart needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

from llama_stack.apis.post_training import JobStatus
from llama_stack.errors import AlreadyExistsError, ConflictError, NotFoundError, OverloadedError
from llama_stack.storage import Database, Migration

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

Kind = Literal["sft", "dpo", "reward"]
CANCELLED = "it was cancelled"

MIGRATIONS = (
    Migration(
        number=1,
        description="jobs",
        statements=(
            # Numbers give the order of the queue. 'iters' is the newest checkpoint when 'attempts' was last reset.
            "CREATE TABLE {jobs} (number INTEGER PRIMARY KEY, uuid TEXT NOT NULL UNIQUE,"
            " folder TEXT NOT NULL UNIQUE, kind TEXT NOT NULL,"
            " request TEXT NOT NULL, plan TEXT NOT NULL, base TEXT, parent TEXT NOT NULL, status TEXT NOT NULL,"
            " reason TEXT, scheduled_at TEXT NOT NULL, started_at TEXT, completed_at TEXT, attempts INTEGER NOT NULL,"
            " iters INTEGER NOT NULL, holds INTEGER NOT NULL)",
            "CREATE INDEX {jobs_by_status} ON {jobs} (status, number)",
        ),
    ),
)

_COLUMNS = "uuid, kind, request, plan, base, parent, status, reason, scheduled_at, started_at, completed_at, attempts"
_UNFINISHED = "status IN ('scheduled', 'running')"


@dataclass(frozen=True)
class Job:
    """One job as the store has it."""

    uuid: str
    kind: Kind
    request: str
    """The body that asked for it, as canonical JSON."""
    plan: str
    """The trainer's ``TrainingPlan`` as JSON."""
    base: str | None
    """The served model that the result belongs to: what an adapter runs on, or whose settings whole weights take."""
    parent: str
    """What training began with, by the name that people know: a model or a job."""
    status: JobStatus = JobStatus.SCHEDULED
    reason: str | None = None
    """Why it failed."""
    scheduled_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    """When it ended, in either way."""
    attempts: int = 0
    """How often it was started since it last saved a new checkpoint."""

    @property
    def is_ended(self) -> bool:
        return self.status in (JobStatus.COMPLETED, JobStatus.FAILED)

    @property
    def folder_name(self) -> str:
        """The name of its folder: ids never become paths (RELIABILITY R11)."""
        return folder_name(self.uuid)


def folder_name(uuid: str) -> str:
    """The name of the folder of the job of this id."""
    return sha256(uuid.encode("utf-8", "surrogatepass")).hexdigest()


class Jobs:
    """The table of jobs. Every change is durable when its method returns, and none undoes an end."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, job: Job, *, queue_size: int) -> bool:
        """Put a job at the end of the queue; False where the same one is there already.

        Raises ``AlreadyExistsError`` where another has its id, and ``OverloadedError`` where the queue is full.
        """
        async with self._database.write() as connection:
            if await self._is_known(connection, job.uuid, job.kind, job.request):
                return False
            waiting = self._database.sql("SELECT count(*) FROM {jobs} WHERE status = 'scheduled'")
            if ((await connection.scalar(waiting)) or 0) >= queue_size:
                raise OverloadedError(
                    f"{queue_size} jobs wait already; cancel one or try later", retry_after_seconds=60
                )
            statement = (
                "INSERT INTO {jobs} (number, uuid, folder, kind, request, plan, base, parent, status, scheduled_at,"
                " attempts, iters, holds) SELECT coalesce(max(number), 0) + 1, :uuid, :folder_name, :kind, :request,"
                " :plan, :base, :parent, 'scheduled', :now, 0, -1, 1 FROM {jobs}"
            )
            values = {
                name: getattr(job, name)
                for name in ("uuid", "folder_name", "kind", "request", "plan", "base", "parent")
            }
            await connection.execute(self._database.sql(statement), values | {"now": _now()})
        return True

    async def is_known(self, uuid: str, kind: Kind, request: str) -> bool:
        """Whether this very job was taken before. Raises ``AlreadyExistsError`` where another has its id."""
        async with self._database.read() as connection:
            return await self._is_known(connection, uuid, kind, request)

    async def _is_known(self, connection: AsyncConnection, uuid: str, kind: Kind, request: str) -> bool:
        statement = self._database.sql("SELECT kind, request FROM {jobs} WHERE uuid = :uuid")
        found = (await connection.execute(statement, {"uuid": uuid})).first()
        if found is not None and tuple(found) != (kind, request):
            raise AlreadyExistsError("job", uuid, param="job_uuid")
        return found is not None

    async def get(self, uuid: str) -> Job:
        """One job. Raises ``NotFoundError``."""
        found = await self._select("uuid = :uuid", {"uuid": uuid})
        if not found:
            raise NotFoundError(f"job {uuid!r} does not exist here", param="job_uuid")
        return found[0]

    async def newest_first(self) -> list[tuple[str, JobStatus]]:
        """All jobs, by their ids, and where they stand."""
        statement = self._database.sql("SELECT uuid, status FROM {jobs} ORDER BY number DESC")
        async with self._database.read() as connection:
            return [(uuid, JobStatus(status)) for uuid, status in await connection.execute(statement)]

    async def unfinished(self) -> Sequence[Job]:
        """The jobs that have not ended, in the order of the queue."""
        return await self._select(_UNFINISHED, {})

    async def of_folder(self, name: str) -> Job | None:
        """The job whose folder has this name."""
        found = await self._select("folder = :name", {"name": name})
        return found[0] if found else None

    async def requeue_running(self) -> None:
        """At a start nothing runs yet: what a server left running goes back to its place in the queue."""
        await self._write("UPDATE {jobs} SET status = 'scheduled' WHERE status = 'running'", {})

    async def begin(self, uuid: str, iters: int) -> Job | None:
        """Count an attempt to run a job, which has a checkpoint of ``iters`` iterations (-1: none).

        None where it has ended meanwhile.
        """
        await self._write(
            "UPDATE {jobs} SET status = 'running', started_at = coalesce(started_at, :now),"
            " attempts = CASE WHEN iters < :iters THEN 1 ELSE attempts + 1 END,"
            " iters = CASE WHEN iters < :iters THEN :iters ELSE iters END"
            f" WHERE uuid = :uuid AND {_UNFINISHED}",
            {"uuid": uuid, "iters": iters, "now": _now()},
        )
        job = await self.get(uuid)
        return None if job.is_ended else job

    async def uncount(self, uuid: str) -> None:
        """Take an attempt back that was none."""
        await self._write("UPDATE {jobs} SET attempts = attempts - 1 WHERE uuid = :uuid", {"uuid": uuid})

    async def complete(self, uuid: str) -> bool:
        """The result is there; False where the job has ended otherwise."""
        return await self._end(uuid, JobStatus.COMPLETED, None)

    async def fail(self, uuid: str, reason: str) -> bool:
        """It cannot go on; False where the job has ended otherwise."""
        return await self._end(uuid, JobStatus.FAILED, reason)

    async def cancel(self, uuid: str) -> None:
        """End a job as failed. Raises ``NotFoundError``, and ``ConflictError`` where it has ended."""
        if not await self._end(uuid, JobStatus.FAILED, CANCELLED):
            job = await self.get(uuid)
            raise ConflictError(f"job {uuid!r} has ended already: it is {job.status.value}", param="job_uuid")

    async def _end(self, uuid: str, status: JobStatus, reason: str | None) -> bool:
        statement = (
            "UPDATE {jobs} SET status = :status, reason = :reason, completed_at = :now"
            f" WHERE uuid = :uuid AND {_UNFINISHED}"
        )
        return await self._write(statement, {"uuid": uuid, "status": status.value, "reason": reason, "now": _now()})

    async def forget(self, uuid: str) -> None:
        """Take back a job whose request was refused after all."""
        await self._write("DELETE FROM {jobs} WHERE uuid = :uuid", {"uuid": uuid})

    async def holding(self) -> Sequence[Job]:
        """The jobs that hold datasets."""
        return await self._select("holds = 1", {})

    async def released(self, uuid: str) -> None:
        """The job holds no dataset any more."""
        await self._write("UPDATE {jobs} SET holds = 0 WHERE uuid = :uuid", {"uuid": uuid})

    async def _write(self, statement: str, values: Mapping[str, Any]) -> bool:
        async with self._database.write() as connection:
            return (await connection.execute(self._database.sql(statement), values)).rowcount > 0

    async def _select(self, where: str, values: Mapping[str, Any]) -> Sequence[Job]:
        statement = self._database.sql(f"SELECT {_COLUMNS} FROM {{jobs}} WHERE {where} ORDER BY number")
        async with self._database.read() as connection:
            return [_job(row._asdict()) for row in await connection.execute(statement, values)]


def _job(row: dict[str, Any]) -> Job:
    times = {name: datetime.fromisoformat(row[name]) for name in row if name.endswith("_at") and row[name] is not None}
    return Job(**row | times | {"status": JobStatus(row["status"])})


def _now() -> str:
    return datetime.now(UTC).isoformat()

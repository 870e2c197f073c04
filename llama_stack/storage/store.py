"""The store that a distribution names: one database, blobs and folders, divided among owners."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from llama_stack.errors import StoreError
from llama_stack.storage.blobs import Blobs
from llama_stack.storage.cancellation import in_thread
from llama_stack.storage.database import BUSY_TIMEOUT_SECONDS, Connections, Database, Health, owner_identifier
from llama_stack.storage.files import make_private_folder
from llama_stack.storage.folder import Folder
from llama_stack.storage.migrations import CORE_MIGRATIONS, CORE_OWNER

FORMS = "sqlite, sqlite:///ABSOLUTE/PATH, sqlite::memory: or postgresql://USER:PASSWORD@HOST:PORT/DATABASE"


class Store:
    """An open store. ``open_store`` makes it."""

    def __init__(self, location: str, connections: Connections, health: Health, folder: Path) -> None:
        self.location = location
        """Where it is, for a line at the start and for readiness; never with a password."""
        self._connections = connections
        self._health = health
        self._folder = folder
        self._owners: dict[str, str] = {}

    def database(self, owner: str) -> Database:
        """The tables of ``owner``: lower-case letters, digits and ``- _ . /``, such as ``memory_banks.local``.

        Raises ``ValueError`` for another form, and ``StoreError`` when two owners would share their tables' names.
        """
        self._claim(owner)
        return Database(owner, self._connections, self._health)

    def blobs(self, owner: str) -> Blobs:
        """The blob folder of ``owner``, named as for ``database``."""
        return Blobs(self._folder / "blobs" / self._claim(owner), self._health)

    async def folder(self, owner: str) -> Folder:
        """The folder of ``owner``, named as for ``database``; it is made where it is missing.

        Raises ``StoreError`` where it cannot be made.
        """
        path = self._folder.absolute() / "folders" / self._claim(owner)
        await in_thread(_make_folder, path)
        return Folder(path)

    @property
    def healthy(self) -> bool:
        """Whether the store takes writes. Once false on SQLite it stays so until a restart."""
        return self._health.healthy

    @property
    def fault(self) -> str | None:
        """Why the store takes no write until a restart, or None."""
        return self._health.fault

    def _claim(self, owner: str) -> str:
        identifier = owner_identifier(owner)
        if owner == CORE_OWNER:
            raise ValueError(f"owner {owner!r} is the stack itself")
        claimed = self._owners.setdefault(identifier, owner)
        if claimed != owner:
            raise StoreError(f"{claimed!r} and {owner!r} would share the names of their tables; rename one")
        return identifier


@asynccontextmanager
async def open_store(
    url: str,
    folder: Path,
    *,
    busy_timeout_seconds: float = BUSY_TIMEOUT_SECONDS,
    on_failure: Callable[[str], object] | None = None,
) -> AsyncIterator[Store]:
    """Open the store that ``url`` names; it is closed at the end of the block.

    ``folder`` is the distribution's state folder, made with mode 0700 when missing. It holds blobs, folders and, for
    the url ``sqlite``, the file ``store.sqlite``. With ``sqlite::memory:`` all of it lies in a temporary folder that
    goes with the block. ``on_failure`` is called once, with the reason, when the store takes no write until a restart:
    end the process then, for what it still holds in memory may be more than the disk has.

    Raises ``StoreError`` (a bad url, a file that is not ours), ``StoreTooNewError``, ``StoreUnavailableError``; no
    message holds the url's password.
    """
    if url == "sqlite::memory:":
        import tempfile

        with tempfile.TemporaryDirectory(prefix="llama-stack-") as temporary:
            health = Health(on_failure)
            served = _sqlite(Path(temporary) / "store.sqlite", health, busy_timeout_seconds, durable=False)
            async with _opened(url, served, health, Path(temporary)) as store:
                yield store
        return
    await in_thread(_make_folder, folder)
    health = Health(on_failure)
    if url.startswith(("postgresql:", "postgres:")):
        location = _redacted(url)
        served = _postgresql(url, location, health, busy_timeout_seconds)
    else:
        path = _sqlite_path(url, folder)
        location = str(path)
        served = _sqlite(path, health, busy_timeout_seconds, durable=True)
    async with _opened(location, served, health, folder) as store:
        yield store


@asynccontextmanager
async def _opened(location: str, connections: Connections, health: Health, folder: Path) -> AsyncIterator[Store]:
    try:
        await connections.prepare()
        await Database(CORE_OWNER, connections, health).migrate(CORE_MIGRATIONS)
        yield Store(location, connections, health, folder)
    finally:
        await connections.close()


def _sqlite(path: Path, health: Health, busy_timeout_seconds: float, *, durable: bool) -> Connections:
    from llama_stack.storage.sqlite import SqliteConnections

    return SqliteConnections(path, health, busy_timeout_seconds=busy_timeout_seconds, durable=durable)


def _postgresql(url: str, location: str, health: Health, busy_timeout_seconds: float) -> Connections:
    from llama_stack.storage.postgresql import PostgresqlConnections

    return PostgresqlConnections(url, location, health, busy_timeout_seconds=busy_timeout_seconds)


def _make_folder(folder: Path) -> None:
    try:
        make_private_folder(folder)
    except OSError as error:
        raise StoreError(f"the folder {folder} cannot be made: {error.strerror}") from error


def _sqlite_path(url: str, folder: Path) -> Path:
    """The file that an SQLite url names. Any number of slashes after ``sqlite://`` begins an absolute path."""
    if url == "sqlite":
        return folder / "store.sqlite"
    scheme, _, rest = url.partition("://")
    if scheme != "sqlite" or not rest.startswith("/"):
        shown = _redacted(url) if "://" in url else scheme.partition(":")[0]
        raise StoreError(f"storage.url {shown!r} is not understood; write {FORMS}")
    if "?" in rest or "#" in rest:
        raise StoreError("storage.url: an SQLite url takes no options; write sqlite:///ABSOLUTE/PATH")
    from urllib.parse import unquote

    path = Path("/" + unquote(rest).lstrip("/"))
    if "\0" in str(path) or path.is_dir() or not path.name:
        raise StoreError(f"storage.url names {str(path)!r}, which is not a file")
    if not path.parent.is_dir():
        raise StoreError(f"storage.url names {path}, and the folder {path.parent} does not exist; make it first")
    return path


def _redacted(url: str) -> str:
    """``url`` without user, password and options. Raises ``StoreError``, which shows none of it."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise StoreError(f"storage.url is not a valid url; write {FORMS}") from None
    if parts.scheme in ("postgresql", "postgres") and not (parts.netloc or "host=" in parts.query):
        raise StoreError(f"storage.url names no host; write {FORMS}")
    if "@" in parts.path + parts.query + parts.fragment:
        raise StoreError("storage.url: write '/', '#', '?' and '@' in a password as %2F, %23, %3F and %40")
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path}"

"""A sandbox for code that a model wrote: bubblewrap around an interpreter, and nothing of the host inside.

The code runs as a user of its own in namespaces of its own (user, process, network, mount, IPC, host name, cgroup),
with an empty environment, a read-only interpreter, and two small file systems in memory. It has no network, sees no
process but its own, cannot gain privileges or make further namespaces, and every process in it dies with the session.
Limits: processes and threads, memory of each process (by the kernel) and of all together (watched from outside), files,
open files, output, and seconds a call.

What it does not have is a filter of system calls: a flaw in the kernel is a way out, as with any container.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from llama_stack.apis import Config
from llama_stack.errors import InvalidRequestError, ProviderStartError

MAX_CODE_CHARACTERS = 100_000
MAX_REPLY_BYTES = 8 * 1024 * 1024
WATCH_SECONDS = 0.05
"""How often the memory of a running call is added up."""
FREEZE_ROUNDS = 100
_HOST_USER = 65534
"""Whom the sandbox runs as on the host where the server is root: for root the kernel counts no processes."""
_PROGRAM = files(__package__).joinpath("sandbox_program.py").read_text(encoding="utf-8")


class SandboxConfig(Config):
    """What code may use."""

    python: Path = Path("/usr/bin/python3")
    """The interpreter, below ``/usr`` or one of ``folders``."""
    folders: tuple[Path, ...] = ()
    """Folders of the host that the code may read, beside ``/usr``; those of packages are also imported from."""
    seconds: float = Field(default=10.0, gt=0, le=600)
    """How long a call may take."""
    memory_bytes: int = Field(default=1024**3, ge=64 * 1024**2)
    """How much memory the code may use, all its processes together."""
    disk_bytes: int = Field(default=64 * 1024**2, ge=1024**2)
    """How much may be written; it is kept in memory and goes with the session."""
    processes: int = Field(default=64, ge=4, le=1000)
    """How many processes and threads there may be at a time."""


@dataclass(frozen=True)
class Result:
    """What a piece of code left behind."""

    output: str
    error: str | None
    """The traceback, where it raised."""
    figures: list[str]
    """PNG images in base64."""


class _Reply(BaseModel, extra="forbid", strict=True):
    """A reply as it may look; the code inside can send anything."""

    output: str
    error: str | None
    figures: list[str]


class Session:
    """One sandbox: what one call defines, the next one finds. ``session`` makes it."""

    def __init__(self, config: SandboxConfig, process: asyncio.subprocess.Process) -> None:
        self._config = config
        self._process = process
        self._one_call = asyncio.Lock()
        self._used_too_much = False

    @property
    def is_over(self) -> bool:
        """Whether the sandbox has ended; it takes no further call."""
        return self._process.returncode is not None

    async def run(self, code: str) -> Result:
        """Run a piece of code. Raises ``InvalidRequestError`` for one that is too long, or ended the session."""
        if len(code) > MAX_CODE_CHARACTERS:
            raise InvalidRequestError(f"the code has more than {MAX_CODE_CHARACTERS} characters")
        async with self._one_call:
            if self.is_over:
                raise InvalidRequestError("the session is over; what it held is lost")
            watch = asyncio.create_task(self._watch())
            try:
                async with asyncio.timeout(self._config.seconds):
                    self._thaw()
                    result = await self._asked(code)
                    await self._freeze()
                    return result
            except TimeoutError as error:
                await self.end()
                what = f"the code took longer than {self._config.seconds:g} s; the session is over"
                raise InvalidRequestError(what) from error
            except (OSError, EOFError, ValueError, ValidationError) as error:
                await self.end()
                used = "used too much memory" if self._used_too_much else "broke it"
                raise InvalidRequestError(f"the sandbox ended: the code {used}; the session is over") from error
            except asyncio.CancelledError:
                await self.end()
                raise
            finally:
                watch.cancel()

    async def end(self) -> None:
        """Kill whatever runs: with the first process of the sandbox the kernel ends all others.

        bubblewrap itself would do that when it goes, but not while it starts: so it is stopped, lest it start anybody
        meanwhile, and its children are killed before it.
        """
        if not self.is_over:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGSTOP)
                for child in _children(self._process.pid):
                    with suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                os.kill(self._process.pid, signal.SIGKILL)
        await self._process.wait()  # which is when nobody holds the other end of its pipes any more

    async def _freeze(self) -> None:
        """Stop all that the code left running: between calls nobody looks at its memory, nor counts its seconds.

        What is stopped can make no further process and wake no other. Raises ``ValueError`` for processes that multiply
        faster than they can be stopped.
        """
        stopped: set[int] = set()
        for _ in range(FREEZE_ROUNDS):
            running = set(_below(self._process.pid)) - stopped
            if not running:
                return
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            stopped |= running
            await asyncio.sleep(0)
        raise ValueError("its processes cannot be stopped")

    def _thaw(self) -> None:
        for pid in _below(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    async def complaint(self) -> str:
        """What bubblewrap said when it ended, if anything."""
        assert self._process.stderr is not None
        said = await self._process.stderr.read(500)
        return said.decode("utf-8", "replace").strip() or "it ended without a word"

    async def _asked(self, code: str) -> Result:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"code": code}).encode() + b"\n")
        await self._process.stdin.drain()
        (length,) = struct.unpack(">I", await self._process.stdout.readexactly(4))
        if length > MAX_REPLY_BYTES:
            raise ValueError("the reply is too long")
        reply = _Reply.model_validate_json(await self._process.stdout.readexactly(length))
        return Result(reply.output, reply.error, reply.figures)

    async def _watch(self) -> None:
        """End the sandbox when its processes together hold too much memory."""
        while _resident_bytes(self._process.pid) <= self._config.memory_bytes:  # noqa: ASYNC110  # nobody tells of it
            await asyncio.sleep(WATCH_SECONDS)
        self._used_too_much = True
        await self.end()


@asynccontextmanager
async def session(config: SandboxConfig) -> AsyncIterator[Session]:
    """A sandbox for the length of a block; nothing of it is left afterwards.

    Raises ``ProviderStartError`` where this machine has no bubblewrap.
    """
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise ProviderStartError(
            "this machine has no bubblewrap (bwrap), and code is not run without a sandbox; install it, "
            "or give the tool 'optional: true'"
        )
    is_root = os.geteuid() == 0
    process = await asyncio.create_subprocess_exec(
        bubblewrap,
        *_arguments(config),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={},
        cwd="/",
        start_new_session=True,
        user=_HOST_USER if is_root else None,
        group=_HOST_USER if is_root else None,
        extra_groups=[] if is_root else None,
    )
    one = Session(config, process)
    try:
        yield one
    finally:
        await one.end()
        if process.stdin is not None:
            process.stdin.close()


async def check(config: SandboxConfig) -> None:
    """Run a line in a sandbox. Raises ``ProviderStartError`` where that does not work here."""
    async with session(config) as probe:
        try:
            result = await probe.run("print(6 * 7)")
        except InvalidRequestError as error:
            said = await probe.complaint()
            what = f"the sandbox does not start on this machine ({said}); allow it namespaces, or give the tool "
            raise ProviderStartError(what + "'optional: true'") from error
    if result.output != "42\n":
        raise ProviderStartError(f"the sandbox's interpreter does not work: {result.output or result.error}")


def _arguments(config: SandboxConfig) -> Iterator[str]:
    size = str(config.disk_bytes)
    yield from (
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
    )
    yield from ("--uid", "1000", "--gid", "1000", "--hostname", "sandbox")
    yield from ("--ro-bind", "/usr", "/usr")
    for name in ("bin", "sbin", "lib", "lib64"):
        yield from ("--symlink", f"usr/{name}", f"/{name}")
    yield from ("--proc", "/proc", "--dev", "/dev", "--size", size, "--tmpfs", "/tmp")
    yield from ("--size", size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev")
    for folder in config.folders:
        yield from ("--ro-bind", str(folder), str(folder))
    yield from ("--remount-ro", "/", "--chdir", "/tmp")
    environment = {"HOME": "/tmp", "PATH": "/usr/bin", "LANG": "C.UTF-8", "MPLBACKEND": "Agg"}
    environment["PYTHONPATH"] = ":".join(map(str, config.folders))
    for name, value in environment.items():
        yield from ("--setenv", name, value)
    yield from ("--", str(config.python), "-s", "-c", _PROGRAM)
    yield from (str(config.processes), str(config.memory_bytes), size)


def _resident_bytes(pid: int) -> int:
    """The memory of a process and of all below it, files in memory among it. One that ends meanwhile counts nothing."""
    total = 0
    page = os.sysconf("SC_PAGE_SIZE")
    held: dict[tuple[int, int], int] = {}
    for each in (pid, *_below(pid)):
        with suppress(OSError, ValueError, IndexError):
            total += page * int(Path(f"/proc/{each}/statm").read_text().split()[1])
        held |= _memory_files(each)
    return total + sum(held.values())


def _memory_files(pid: int) -> dict[tuple[int, int], int]:
    """The bytes of each file in memory (memfd_create) that a process holds open: no mapping counts them."""
    found: dict[tuple[int, int], int] = {}
    with suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if os.readlink(entry.path).startswith("/memfd:"):
                    status = os.stat(entry.path)
                    found[status.st_dev, status.st_ino] = 512 * status.st_blocks
    return found


def _below(pid: int) -> list[int]:
    """All processes below one."""
    found: list[int] = []
    pending = _children(pid)
    while pending:
        each = pending.pop()
        found.append(each)
        pending += _children(each)
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found

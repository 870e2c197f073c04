"""Sixty programs that want out of the sandbox, or want more than their share; and what stays within it."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from llama_stack_agents.tools.code_interpreter import CodeInterpreter
from llama_stack_agents.tools.sandbox import SandboxConfig, Session, check, session

from llama_stack.apis.common import Attachment
from llama_stack.errors import InvalidRequestError, ProviderStartError

pytestmark = pytest.mark.anyio

SMALL = SandboxConfig(
    seconds=4, memory_bytes=256 * 1024**2, disk_bytes=8 * 1024**2, processes=32, python=Path("/usr/bin/python3")
)
MARK = "What runs inside the sandbox"
"""In the command line of every process of a sandbox."""


def _works() -> str:
    try:
        asyncio.run(check(SMALL))
    except ProviderStartError as error:
        return error.detail
    return ""


REASON = _works()
needs_sandbox = pytest.mark.skipif(bool(REASON), reason=REASON or "it works")


def left() -> list[int]:
    """The processes of sandboxes that are still there."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if MARK.encode() in command:
                found.append(int(folder.name))
    return found


@asynccontextmanager
async def small() -> AsyncIterator[Session]:
    """A sandbox with tight limits, of which nothing may be left."""
    async with session(SMALL) as one:
        yield one
    async with asyncio.timeout(20):
        while left():
            await asyncio.sleep(0.01)


REFUSED = {
    # the environment and the host's files
    "import os; print(sorted(os.environ))": r"^\['HOME', 'LANG', 'MPLBACKEND', 'PATH', 'PWD', 'PYTHONPATH'\]$",
    "open('/etc/passwd')": "No such file",
    "open('/etc/shadow')": "No such file",
    "open('/root/.bashrc')": "No such file",
    "import os; print(os.listdir('/'))": r"^\[[^\]]*\]$",
    "import os; os.listdir('/home')": "No such file",
    "import os; os.listdir('/var')": "No such file",
    "open('/proc/1/environ','rb').read() and print('seen')": r"^b''$",
    "open('/sys/kernel/hostname')": "No such file",
    "open('/dev/mem')": "No such file",
    "open('/dev/sda','rb')": "No such file",
    "import os; print([p for p in os.listdir('/proc') if p.isdigit()])": r"^\['1', '2'\]$",
    "open('/usr/bin/python3','ab')": "Read-only file system|Permission denied",
    "open('/new','w')": "Read-only file system",
    "open('/dev/new','w')": "Read-only file system",
    "import os; os.mkdir('/usr/new')": "Read-only file system|Permission denied",
    "open('/proc/sys/kernel/hostname','w')": "Permission denied|Read-only file system",
    "open('/proc/sysrq-trigger','w').write('b')": "Permission denied|Read-only|No such file",
    "import os; os.symlink('/etc/passwd','/tmp/l'); open('/tmp/l')": "No such file",
    "import os; os.link('/usr/bin/python3','/tmp/l')": "Invalid cross-device link|Operation not permitted",
    "open('/tmp/../etc/passwd')": "No such file",
    "open('/proc/self/root/etc/passwd')": "No such file",
    "open('/proc/1/root/etc/passwd')": "Permission denied|No such file",
    # the network
    "import socket; socket.create_connection(('127.0.0.1', 8321), 1)": "refused",
    "import socket; socket.create_connection(('10.0.0.1', 80), 1)": "unreachable",
    "import socket; socket.create_connection(('1.1.1.1', 53), 1)": "unreachable",
    "import socket; socket.getaddrinfo('example.com', 80)": "resolution|not known",
    "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))": "unreachable",
    "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)": "not permitted",
    "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)": "not permitted",
    "import socket; print(socket.if_nameindex())": r"^\[\(1, 'lo'\)\]$",
    "import socket; socket.socket(socket.AF_UNIX).connect('/run/docker.sock')": "No such file",
    # privileges
    "import os; os.setuid(0)": "not permitted|Invalid argument",
    "import os; os.setgid(0)": "not permitted|Invalid argument",
    "import os; os.setgroups([0])": "not permitted",
    "import os; os.chown('/tmp', 0, 0)": "not permitted|Invalid argument",
    "import os; os.chroot('/tmp')": "not permitted",
    "import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))": r"^-1$",
    "import ctypes; print(ctypes.CDLL(None).unshare(0x20000))": r"^-1$",
    "import ctypes; print(ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None))": r"^-1$",
    "import ctypes; print(ctypes.CDLL(None).umount(b'/proc'))": r"^-1$",
    "import ctypes, os; print(ctypes.CDLL(None).ptrace(16, os.getppid() - 1, 0, 0))": r"^-1$",
    "import ctypes; print(ctypes.CDLL(None).sethostname(b'x', 1))": r"^-1$",
    "import ctypes; print(ctypes.CDLL(None).reboot(0x1234567))": r"^-1$",
    "import os; os.mknod('/tmp/d', 0o60600, os.makedev(8, 0))": "not permitted",
    "import shutil; print(shutil.which('bwrap') and __import__('subprocess').run(['bwrap','--ro-bind','/','/','id']"
    ",capture_output=True).returncode)": r"^(1|None)$",
    "import os; os.nice(-5)": "not permitted|Permission denied",
    "import resource as r; r.setrlimit(r.RLIMIT_NPROC, (99999, 99999))": "not allowed|exceeds",
    "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))": "not allowed|exceeds",
    # more than its share, refused by the kernel
    "x = bytearray(10**9)": "MemoryError",
    "open('/tmp/big','wb').write(bytes(9 * 1024**2))": "No space left|File too large",
    "open('/dev/shm/big','wb').write(bytes(9 * 1024**2))": "No space left|File too large",
    "files = [open('/dev/null') for _ in range(1000)]": "Too many open files",
    "print('x' * 10**6)": r"more bytes\]",
    "import os\nfor _ in range(1000): os.write(1, b'y' * 100000)": "No space left|File too large",
    "def f(): f()\nf()": "RecursionError",
    "import sys; sys.exit(3)": "SystemExit: 3",
    "exit()": "SystemExit",
    "import os; os.kill(-1, 9)": "No such process",
    # a bounded stand-in for the fork bomb, with the limit looked at before anything is forked
    "import os, resource, time\n"
    "assert resource.getrlimit(resource.RLIMIT_NPROC)[1] <= 32\n"
    "for n in range(100):\n    if os.fork() == 0: time.sleep(60); os._exit(0)": "Resource temporarily unavailable",
    "import threading, time\n"
    "for n in range(100): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()": "can't start new",
}
"""Programs that are told no and go on, and what they are told."""

FORGE = "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'%s')\n    except OSError: pass"
"""Writes a reply of its own on whatever channel there may be."""

ENDED = {
    "while True: pass": "took longer than 4 s",
    "import time; time.sleep(60)": "took longer than 4 s",
    "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\nwhile True: pass": "took longer",
    "import os; os._exit(0)": "broke it",
    "import os; os.kill(os.getpid(), 9)": "broke it",
    "import ctypes; print(ctypes.CDLL(None).ptrace(16, 1, 0, 0))\nwhile True: pass": "took longer",
    "import ctypes; ctypes.string_at(0)": "broke it",
    "import os; os.close(0); os.closerange(3, 255)": "broke it|took longer",
    FORGE % (r"\x7f\xff\xff\xff" * 10): "broke it",
    FORGE % r"\0\0\0\2{}": "broke it",
    "import os\nkeep = []\nfor n in range(8):\n    if os.fork() == 0:\n        x = bytearray(100 * 1024**2)\n        "
    "import time; time.sleep(60)\nimport time; time.sleep(60)": "too much memory",
    "import os, time\nkeep = [os.memfd_create(str(n)) for n in range(64)]\n"
    "for fd in keep: os.write(fd, bytes(7 * 1024**2))\ntime.sleep(60)": "too much memory",
}
"""Programs that end the session, and why."""


@needs_sandbox
@pytest.mark.parametrize("program", REFUSED, ids=lambda program: program[:50])
async def test_a_program_that_wants_too_much_is_told_no(program: str) -> None:
    """By the kernel, in words that the model can read; the session goes on."""
    async with small() as one:
        result = await one.run(program)
        told = (result.output + (result.error or "")).strip()
        assert re.search(REFUSED[program], told, re.MULTILINE), told
        assert (await one.run("6 * 7")).output == "42\n"


@needs_sandbox
@pytest.mark.parametrize("program", ENDED, ids=lambda program: program[:50])
async def test_a_program_that_breaks_the_sandbox_ends_with_it(program: str) -> None:
    """And with it every process that it began."""
    async with small() as one:
        with pytest.raises(InvalidRequestError, match=ENDED[program]):
            await one.run(program)
        assert one.is_over
        with pytest.raises(InvalidRequestError, match="the session is over"):
            await one.run("1")


@needs_sandbox
async def test_a_process_that_goes_into_the_background_dies_with_the_session() -> None:
    """Detached twice, with a session of its own, as daemons are; ``small`` looks for what is left."""
    daemon = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        time.sleep(600)\n    os._exit(0)\nos.wait()\n'away'"
    )
    async with small() as one:
        assert (await one.run(daemon)).output == "'away'\n"
        assert len(left()) >= 3


def states_of(pids: list[int]) -> set[str]:
    """What each process does, by the letters of proc(5)."""
    return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids}


@needs_sandbox
async def test_what_code_leaves_running_does_not_run_between_calls() -> None:
    """Neither a process nor a thread: nobody counts their seconds while the model thinks; the next call finds them."""
    busy = (
        "import os, threading\ncount = 0\ndef work():\n    global count\n    while True: count += 1\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "if os.fork() == 0:\n    while True: pass\n'busy'"
    )
    async with small() as one:
        assert (await one.run(busy)).output == "'busy'\n"
        assert len(left()) >= 3
        async with asyncio.timeout(10):  # the system stops a running process in its own time
            while not states_of(left()[1:]) <= {"T", "S"}:
                await asyncio.sleep(0.01)
        assert (await one.run("count > 0")).output == "True\n"


def test_there_are_sixty_programs_and_more() -> None:
    """The plan's number."""
    assert len(REFUSED) + len(ENDED) + 1 >= 60


@needs_sandbox
async def test_what_one_call_defines_the_next_one_finds() -> None:
    """A session is one namespace, and its files stay too."""
    async with small() as one:
        await one.run("import math\nradius = 2\nopen('note', 'w').write('kept')")
        result = await one.run("print(open('note').read())\nmath.pi * radius ** 2")
        assert result.output == "kept\n12.566370614359172\n"
        assert result.error is None


@needs_sandbox
async def test_an_error_is_a_traceback_of_the_code_and_the_session_goes_on() -> None:
    """The model corrects itself by it; our own lines are not in it."""
    async with small() as one:
        result = await one.run("print('before')\n1 / 0")
        assert result.output == "before\n"
        assert result.error == (
            "Traceback (most recent call last):\n"
            '  File "<code>", line 2, in <module>\n'
            "ZeroDivisionError: division by zero\n"
        )
        assert "SyntaxError" in ((await one.run("1 +")).error or "")


@needs_sandbox
async def test_sessions_do_not_see_each_other() -> None:
    """Two turns at once."""
    async with small() as one, session(SMALL) as other:
        await one.run("secret = 1; open('/tmp/secret', 'w').write('x')")
        assert "NameError" in ((await other.run("secret")).error or "")
        assert (await other.run("import os; os.path.exists('/tmp/secret')")).output == "False\n"


@needs_sandbox
async def test_a_call_that_is_cancelled_ends_its_sandbox() -> None:
    """A client that leaves stops its code."""
    async with small() as one:
        task = asyncio.create_task(one.run("import time; time.sleep(60)"))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert one.is_over


@needs_sandbox
async def test_a_session_that_ends_while_it_starts_leaves_nothing() -> None:
    """bubblewrap's own care for its children begins only when it has started them."""
    for pause_seconds in (0, 0, 0, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03):
        async with small():
            await asyncio.sleep(pause_seconds)


@needs_sandbox
async def test_figures_come_back_as_pictures() -> None:
    """Drawn here by a stand-in with pyplot's interface: it shows the way that a figure takes."""
    with tempfile.TemporaryDirectory() as folder:  # not one of pytest's, which nobody else can enter
        Path(folder).chmod(0o755)
        await _draw(Path(folder))


async def _draw(folder: Path) -> None:
    package = folder / "matplotlib"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "pyplot.py").write_text(
        "class Figure:\n"
        "    def savefig(self, path, format): open(path, 'wb').write(b'PNG')\n"
        "_open = {}\n"
        "def plot(x): _open[len(_open) + 1] = Figure()\n"
        "def get_fignums(): return list(_open)\n"
        "def figure(number): return _open[number]\n"
        "def close(what): _open.clear()\n"
    )
    tool = CodeInterpreter(SMALL.model_copy(update={"folders": (folder,)}))
    async with tool.session() as one:
        shown = await one.call(
            "code_interpreter", {"code": "import matplotlib.pyplot as plt\nplt.plot([1])\nprint('drawn')"}
        )
        assert shown == [
            "drawn\n",
            Attachment(url=f"data:image/png;base64,{base64.b64encode(b'PNG').decode()}", mime_type="image/png"),
        ]
        assert await one.call("code_interpreter", {"code": "1"}) == "1\n"


@needs_sandbox
async def test_the_tool_takes_code_and_nothing_else() -> None:
    """What a model writes is not checked by anybody else; code without a word has none."""
    tool = CodeInterpreter(SMALL)
    for arguments in ({}, {"code": 1}, {"code": "1", "x": 2}, {"python": "1"}):
        with pytest.raises(InvalidRequestError, match="takes one argument"):
            await tool.run(arguments)
    assert await tool.run({"code": "x = 1"}) == "(no output)"
    with pytest.raises(InvalidRequestError, match="more than"):
        await tool.run({"code": "#" * 200_000})


async def test_without_bubblewrap_the_tool_does_not_start_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code is not run without a sandbox, whatever the machine."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ProviderStartError, match="no bubblewrap"):
        await check(SMALL)


async def test_a_bubblewrap_that_may_not_do_its_work_is_told_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Many hosts forbid namespaces; the operator reads bubblewrap's own words."""
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(fake))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)  # whoever runs this can run the file
    with pytest.raises(ProviderStartError, match="No permissions to create new namespace"):
        await check(SMALL)

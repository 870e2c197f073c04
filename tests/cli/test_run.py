"""``run``: from a file to a server that answers, and every way in which that may be refused."""

from __future__ import annotations

import json
import signal
import socket
import urllib.request
from pathlib import Path

from tests.broken_plugins import install
from tests.cli.called import Run, Served, process

HERE = """
version: 1
name: here
providers:
  inference:
    - provider: stub
      config: { models: [stub, other] }
faces:
  - face: bare
server: { port: 0 }
"""
FACE = """
    from collections.abc import AsyncIterator
    from contextlib import asynccontextmanager
    from fastapi import APIRouter
    from llama_stack.plugins import FaceSpec, hookimpl

    @asynccontextmanager
    async def start() -> AsyncIterator[APIRouter]:
        yield APIRouter()

    @hookimpl
    def llama_stack_faces():
        return [FaceSpec(name="bare", start=start)]
"""

LISTLESS = """
    from collections.abc import AsyncIterator
    from contextlib import asynccontextmanager
    from llama_stack.apis import Inference
    from llama_stack.plugins import ProviderSpec, hookimpl
    from llama_stack.testing.stub_inference import StubConfig, StubInference

    class Listless(StubInference):
        async def models(self):
            raise RuntimeError("no list")

    @asynccontextmanager
    async def start() -> AsyncIterator[Inference]:
        yield Listless(StubConfig())

    @hookimpl
    def llama_stack_providers():
        return [ProviderSpec(api=Inference, name="listless", start=start)]
"""


def here(folder: Path) -> Path:
    """Install the stub and a face beside the other packages, and write a distribution that uses them."""
    install(folder, "acme-stub", {}, {"stub": "llama_stack.testing.stub_inference:stub"})
    install(folder, "acme-face", {"acme_face": FACE}, {"bare": "acme_face"})
    file = folder / "here.yaml"
    file.write_text(HERE)
    return file


def test_run_says_what_it_serves_serves_it_and_ends_with_0(tmp_path: Path) -> None:
    """The first lines on stdout are the address, the providers, the faces and the models; a signal ends it cleanly."""
    file = here(tmp_path)
    with process("run", str(file), "--port", "0", site=tmp_path, home=tmp_path / "home") as started:
        assert started.stdout is not None
        first = started.stdout.readline()
        assert first.startswith("here answers at http://127.0.0.1:")
        lines = [started.stdout.readline() for _ in range(4)]
        assert lines[0].startswith("  inference: stub is ready after ")
        assert lines[1:] == ["  face: bare is ready\n", "  model other\n", "  model stub\n"]
        url = first.split()[-1]
        with urllib.request.urlopen(f"{url}/health/ready") as answer:
            assert json.load(answer)["status"] == "ready"
        started.send_signal(signal.SIGTERM)
        out, err = started.communicate(timeout=60)
    assert (started.returncode, out) == (0, "")
    assert all(json.loads(line) for line in err.splitlines())


def test_models_that_cannot_be_listed_are_a_warning_in_the_log(tmp_path: Path) -> None:
    """The server runs, so its address is printed all the same."""
    install(tmp_path, "acme-listless", {"acme_listless": LISTLESS}, {"listless": "acme_listless"})
    file = tmp_path / "bare.yaml"
    file.write_text("version: 1\nname: bare\nproviders: { inference: [{ provider: listless }] }\n")
    with process("run", str(file), "--port", "0", site=tmp_path, home=tmp_path / "home") as started:
        assert started.stdout is not None
        assert started.stderr is not None
        assert started.stdout.readline().startswith("bare answers at http://127.0.0.1:")
        logged = next(line for line in started.stderr if "cannot be listed" in line)
        assert json.loads(logged)["level"] == "warning"
        started.send_signal(signal.SIGTERM)
        started.communicate(timeout=60)
    assert started.returncode == 0


def test_a_port_on_the_command_line_goes_before_the_files(run: Run, tmp_path: Path, server: Served) -> None:
    """Seen by its refusal: the port named there is taken, the file's is free."""
    file = tmp_path / "near.yaml"
    file.write_text(
        "version: 1\nname: near\nproviders:\n  inference:\n"
        f"    - {{ provider: remote, config: {{ url: '{server.url}' }} }}\nserver: {{ port: 0 }}\n"
    )
    taken = server.url.rpartition(":")[2]
    ran = run("run", str(file), "--port", taken)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"error: cannot listen on 127.0.0.1:{taken}")
    ran = run("run", str(file), "--host", "0.0.0.0", "--port", "0")
    assert (ran.code, ran.out) == (1, "")
    assert "server.allowed_hosts" in ran.err


def test_a_host_that_is_none_is_misuse(run: Run) -> None:
    """A script that passes an empty variable should read which option it was, and no traceback."""
    for host in ("", "h" * 256):
        ran = run("run", "tiny", "--host", host)
        assert (ran.code, ran.out) == (2, "")
        assert "Invalid value for '--host': name a host or an address of this machine" in ran.err


def test_a_provider_that_does_not_start_is_the_error(run: Run, tmp_path: Path) -> None:
    """The first thing that went wrong, and what to do about it, on the last line of stderr."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    file = tmp_path / "near.yaml"
    file.write_text(
        "version: 1\nname: near\nproviders:\n  inference:\n"
        f"    - {{ provider: remote, config: {{ url: 'http://127.0.0.1:{port}' }} }}\nserver: {{ port: 0 }}\n"
    )
    ran = run("run", str(file))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-1].startswith(
        "error: provider 'remote' of 'inference' did not start: cannot connect to the remote stack"
    )
    assert "Traceback" not in ran.err


def test_a_faulty_file_is_refused_with_every_fault(run: Run, tmp_path: Path) -> None:
    """The lines of ``check``, as errors."""
    file = tmp_path / "bad.yaml"
    file.write_text("version: 1\nname: bad\nproviders: {}\nserver: { prot: 1, post: 2 }\n")
    ran = run("run", str(file))
    assert (ran.code, ran.out) == (1, "")
    assert [line.startswith(f"error: {file}:4:") for line in ran.err.splitlines()] == [True, True]


def test_an_unknown_name_is_refused_with_those_that_exist(run: Run) -> None:
    """A typing error in a name must not end in a stack trace about a file."""
    ran = run("run", "tinny")
    assert (ran.code, ran.out) == (1, "")
    assert "tiny" in ran.err

"""Plugins that were built once go on working: wheels of older days, installed as they are and run by today's core.

``llama_stack_parrot-1.0`` brings one of everything and was built against version 1.0 of the plugin interface. A wheel
in ``old_plugins`` is never built anew: whoever has to change one has broken a promise to those who publish plugins.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from llama_stack.apis.common import Dialog, Message, ShieldConfig
from llama_stack.apis.inference import ChatCompletionRequest
from llama_stack.apis.safety import RunShieldRequest
from llama_stack.client import AsyncClient
from llama_stack.distribution import load_distribution
from llama_stack.plugins import discover
from llama_stack.registry import Registry
from llama_stack.server import listening
from llama_stack.stack import Stack, running

WHEELS = sorted((Path(__file__).parent / "old_plugins").glob("*.whl"))

PARROT = """\
version: 1
name: aviary
providers:
  inference: [{provider: parrot, config: {model: llama3_8b_chat}}]
  safety: [{provider: parrot}]
  perches: [{provider: perch}]
tools: [{tool: parrot}]
faces: [{face: parrot}]
middleware: [{middleware: parrot}]
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on ``sys.path`` into which the wheels are laid, as pip does it."""
    folder = tmp_path / "site"
    for wheel in WHEELS:
        zipfile.ZipFile(wheel).extractall(folder)
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("llama_stack_parrot"):
            del sys.modules[name]


@pytest.mark.anyio
async def test_an_old_plugin_serves_all_that_it_brings(site: Path, tmp_path: Path) -> None:
    """Its API, its providers, its tool, its face and its middleware, by HTTP and unchanged since its day."""
    file = tmp_path / "aviary.yaml"
    file.write_text(PARROT)
    registry = Registry([plugin for plugin in discover() if plugin.package == "llama-stack-parrot"])
    distribution = load_distribution(file, environ={}, registry=registry)
    config = distribution.server.model_copy(update={"port": 0})
    async with (
        running(Stack(distribution, registry, state_folder=tmp_path / "state")) as stack,
        listening(stack, config) as server,
        AsyncClient(server.url) as client,
        httpx2.AsyncClient(base_url=server.url) as http,
    ):
        said = Message.user("polly wants a cracker")
        request = ChatCompletionRequest(model="llama3_8b_chat", dialog=Dialog(message=said), max_tokens=3)
        whole = await client.inference.chat_completion(request)
        assert whole.content == "polly wants a"  # type: ignore[union-attr]
        shield = ShieldConfig(shield_type="parrot", params={})
        verdict = await client.safety.run_shield(RunShieldRequest(messages=[said], shield=shield))
        assert verdict.violation is not None
        assert (await http.get("/perches/list")).json() == ["oak", "elm"]
        answer = await http.get("/parrots")
        assert (answer.json(), answer.headers["x-parrot"]) == (["llama3_8b_chat"], "parrot")
    async with registry.tool("parrot").spec.start() as tool:
        assert await tool.run({"times": 2}) == "squawk squawk "


def test_an_old_plugins_command_runs(site: Path) -> None:
    """By its entry point, as ``llama-stack`` finds it."""
    from click.testing import CliRunner

    from llama_stack.cli.commands import Commands

    ran = CliRunner().invoke(Commands(name="llama-stack"), ["squawk"])
    assert (ran.exit_code, ran.output) == (0, "squawk\n")

"""``llama-stack new-plugin``: a package that installs, passes the conformance kit and runs, to be filled in."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import plugins_dir, registry

if TYPE_CHECKING:
    from ..apis import Api

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LONGEST_NAME = 40
_NOT_WRITTEN = 'raise NotProvidedError("this is not written yet")'

_INFERENCE = '''\
"""Serves the model {name}, which says what it hears."""

from llama_stack.plugins import provides
from llama_stack.text_inference import TextInference


class {cls}(TextInference):
    names = ("{name}",)

    async def pieces(self, messages, request):
        for word in str(messages[-1].content).split():
            yield f"{{word}} "


llama_stack_providers = provides("{name}", {cls})
'''

_SAFETY = '''\
"""The shield {name}, which has no objection to anything."""

from llama_stack.apis import Safety
from llama_stack.apis.safety import RunShieldRequest, RunShieldResponse
from llama_stack.errors import InvalidRequestError, NotFoundError
from llama_stack.plugins import provides


class {cls}(Safety):
    async def shields(self) -> list[str]:
        return ["{name}"]

    async def run_shield(self, request: RunShieldRequest) -> RunShieldResponse:
        if request.shield.shield_type != "{name}":
            raise NotFoundError(f"no shield {{request.shield.shield_type!r}} here", param="shield_type")
        if request.shield.params:
            raise InvalidRequestError("this shield has no parameters", param="params")
        return RunShieldResponse()


llama_stack_providers = provides("{name}", {cls})
'''

_TEST = '''\
"""The rules of the contract; `pytest` tries each of them on the provider."""

from llama_stack.testing.conformance import conformance

pytest_plugins = "llama_stack.testing.plugin"

test_{module} = conformance("{api}", "{name}")
'''

_PROJECT = """\
[project]
name = "llama-stack-{name}"
version = "0.1.0"
dependencies = ["llama-stack>={major}.{minor}"]
entry-points.llama_stack.{name} = "llama_stack_{module}"
"""

_DISTRIBUTION = """\
version: 1
name: "{name}"
providers:
  {api}:
    - provider: "{name}"
"""

_README = """\
# llama-stack-{name}

A provider of `{api}` for Llama Stack.

    pip install -e . pytest          # the plugin, as you edit it
    pytest                           # the conformance kit: what is not right yet
    llama-stack run {name}.yaml      # a server with it
    pip wheel --no-deps .            # the wheel to publish
"""


@click.command(name="new-plugin")
@click.argument("name")
@click.option("--api", default="inference", show_default=True, metavar="API", help="What the plugin's provider serves.")
@click.option("--single-file", is_flag=True, help="Write NAME.py alone, for a folder of plugins.")
@plugins_dir
def command(name: str, api: str, single_file: bool, plugins_dir: Path | None) -> None:
    """Write a plugin that installs, passes the conformance kit and runs: the folder llama-stack-NAME."""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise click.BadParameter(
            f"use lowercase letters, digits and single dashes, a letter first, at most {_LONGEST_NAME}",
            param_hint="NAME",
        )
    contract = registry(plugins_dir).api(api)
    module = name.replace("-", "_")
    values = {"name": name, "api": api, "module": module, "cls": "".join(map(str.capitalize, name.split("-")))}
    source = _source(contract, values)
    if single_file:
        _write(Path(f"{module}.py"), source)
        click.echo(f"{module}.py: try it with --plugins-dir . on run, check or list")
        return
    from .. import __version__

    major, minor = __version__.split(".")[:2]
    folder = Path(f"llama-stack-{name}")
    if folder.exists():
        raise click.UsageError(f"{folder} exists already")
    try:
        (folder / "tests").mkdir(parents=True)
    except OSError as error:
        raise click.UsageError(f"{folder} cannot be made: {error.strerror}") from error
    for path, text in {
        f"llama_stack_{module}.py": source,
        "pyproject.toml": _PROJECT.format(**values, major=major, minor=minor),
        f"{name}.yaml": _DISTRIBUTION.format(**values),
        "tests/test_conformance.py": _TEST.format(**values),
        "README.md": _README.format(**values),
    }.items():
        _write(folder / path, text)
    click.echo(f"{folder}: next, 'cd {folder}', 'pip install -e . pytest', 'pytest', 'llama-stack run {name}.yaml'")


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise click.UsageError(f"{path} exists already") from None
    except OSError as error:
        raise click.UsageError(f"{path} cannot be written: {error.strerror}") from error


def _source(contract: type[Api], values: dict[str, str]) -> str:
    """The module: a provider that works, where one is short, else every operation of the contract, to be written."""
    known = {"inference": _INFERENCE, "safety": _SAFETY}.get(contract.name)
    return _skeleton(contract, values) if known is None else known.format(**values)


def _skeleton(contract: type[Api], values: dict[str, str]) -> str:
    module = sys.modules[contract.__module__]
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(contract))).body
    assert isinstance(tree, ast.ClassDef), "a contract is a class"
    methods: list[str] = []
    used: set[str] = set()
    for node in tree.body:
        if not isinstance(node, ast.AsyncFunctionDef) or not getattr(
            getattr(contract, node.name), "__isabstractmethod__", False
        ):
            continue
        node.decorator_list = []
        words = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        used |= {word for word in words if hasattr(module, word)}
        said = ast.get_docstring(node) or ""
        head = ast.unparse(ast.AsyncFunctionDef(**{**vars(node), "body": [ast.Pass()]})).removesuffix("\n    pass")
        methods.append(f'{head}\n    """{said.partition(chr(10))[0]}"""\n    {_NOT_WRITTEN}')
    body = textwrap.indent("\n\n".join(methods), "    ")
    abc = sorted(word for word in used if getattr(module, word).__module__ == "collections.abc")
    own = sorted(used - set(abc) | {contract.__name__})
    lines = [f"from collections.abc import {', '.join(abc)}", ""] if abc else []
    lines += [f"from {contract.__module__} import (", *(f"    {word}," for word in own), ")"]
    lines += ["from llama_stack.errors import NotProvidedError", "from llama_stack.plugins import provides"]
    docs = f'"""The provider {values["name"]} of {contract.name}."""'
    return (
        f"{docs}\n\n" + "\n".join(lines) + f"\n\n\nclass {values['cls']}({contract.__name__}):\n{body}\n\n\n"
        f'llama_stack_providers = provides("{values["name"]}", {values["cls"]})\n'
    )

"""Code guard: insecure code and secrets in what is said. bandit judges Python; rules judge every other language."""

from __future__ import annotations

import ast
import asyncio
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama_stack.apis import Config
from llama_stack.apis.common import Message
from llama_stack.apis.safety import Violation

from .code_rules import ALIASES, matches
from .secrets import secrets_in
from .shield import Shield, ShieldSettings, text_of

MAX_CHARACTERS = 200_000
"""Longer texts are not judged: the time that this takes grows with their length."""
MAX_LISTED = 20
"""Findings that a violation lists."""

Severity = Literal["low", "medium", "high"]
_LEVELS: Mapping[str, int] = {"low": 1, "medium": 2, "high": 3}
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1|\Z)", re.MULTILINE | re.DOTALL)


class CodeGuardParams(Config):
    """How strict the guard is."""

    severity: Severity = "medium"
    """The least severity that is objected to."""
    secrets: bool = True
    """Whether secrets are looked for."""


class CodeGuardConfig(ShieldSettings):
    """How code is judged."""

    params: CodeGuardParams = CodeGuardParams()
    """What an agent that says nothing else gets."""


@dataclass(frozen=True)
class Block:
    """A piece of code in a text."""

    language: str
    """Lower case; empty where the text does not say."""
    code: str


class CodeGuard(Shield[CodeGuardParams]):
    """Objects to insecure code and to secrets."""

    shield_type = "code_guard"
    known_good = Message.assistant("```python\ndef add(a, b):\n    return a + b\n```")
    known_bad = Message.assistant("```python\nimport subprocess\nsubprocess.call(command, shell=True)\n```")

    def __init__(self, config: CodeGuardConfig) -> None:
        self.defaults = config.params

    def details(self) -> Mapping[str, str]:
        return {"analyser": f"bandit {_bandit_version()} for Python, rules for other languages"}

    async def judge(self, messages: Sequence[Message], params: CodeGuardParams) -> Violation | None:
        """Judge the last message. Its text beside code is searched for secrets alone."""
        findings = await asyncio.to_thread(inspect, text_of(messages[-1]), params)
        if not findings:
            return None
        more = f"; and {len(findings) - MAX_LISTED} more" if len(findings) > MAX_LISTED else ""
        return Violation(violation_type="insecure_code", details="; ".join(findings[:MAX_LISTED]) + more)


def inspect(text: str, params: CodeGuardParams) -> list[str]:
    """What is wrong with the code in a text, a line a finding. Raises ``ValueError`` for a text that is too long."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the text has {len(text)} characters, and at most {MAX_CHARACTERS} are judged")
    findings = [f"{kind} in line {line}" for kind, line in secrets_in(text)] if params.secrets else []
    for block in code_blocks(text):
        findings += _inspect_block(block, _LEVELS[params.severity])
    return list(dict.fromkeys(findings))


def code_blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a text, also one that is not closed; or the whole text, where it is code without a fence."""
    fenced = [Block(ALIASES.get(m[2].lower(), m[2].lower()), m[3]) for m in _FENCE.finditer(text)]
    if fenced:
        yield from fenced
    else:
        yield Block("python" if _is_program(text) else "", text)


def _is_program(text: str) -> bool:
    """Whether a text without a fence is Python: it parses, and does something that prose cannot."""
    tree = _parsed(text)
    telling = ast.Import | ast.ImportFrom | ast.Call | ast.FunctionDef | ast.ClassDef | ast.Assign
    return tree is not None and any(isinstance(node, telling) for node in ast.walk(tree))


def _inspect_block(block: Block, least: int) -> list[str]:
    is_python = block.language == "python" or (not block.language and _is_program(block.code))
    if is_python and _parsed(block.code) is not None:
        return _bandit(block.code, least)
    return [
        f"{rule.name} in line {line} of the {block.language or 'code'}"
        for rule, line in matches(block.code, block.language)
        if _LEVELS[rule.severity] >= least
    ]


def _parsed(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested deeper than Python reads
        return None


def _bandit(code: str, least: int) -> list[str]:
    """bandit's findings; comments that tell it to look away are not obeyed."""
    from bandit.core.config import BanditConfig
    from bandit.core.constants import RANKING
    from bandit.core.manager import BanditManager

    with tempfile.TemporaryDirectory(prefix="code-guard-") as folder:
        file = Path(folder) / "code.py"
        file.write_text(code, encoding="utf-8", errors="surrogatepass")
        manager = BanditManager(BanditConfig(), "file", quiet=True, ignore_nosec=True)
        manager.files_list = [str(file)]
        manager.run_tests()
        if manager.skipped:
            raise ValueError(f"bandit could not read the code: {manager.skipped[0][1]}")
        found = manager.get_issue_list(sev_level=RANKING[least], conf_level=RANKING[1])
    return [f"{issue.test_id} {issue.text} in line {issue.lineno} of the python" for issue in found]


def _bandit_version() -> str:
    from importlib.metadata import version

    return version("bandit")

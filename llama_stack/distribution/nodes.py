"""YAML text to marked nodes: what may stand in a distribution's file, and what each plain word means.

The reader takes parser events, so that it can stop at a cap before anything is built and report several faults in one
run. Plain words mean what YAML 1.2's core schema says. A word that YAML 1.1 readers take for something else (``no``,
``0123``, ``1_000``, ``12:30``, ``2024-01-01``) is refused instead of changing its meaning in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from .faults import Fault, Mark, Path, is_secret, shortened

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 20_000

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# control characters, and the ones that make text look other than it is read (Unicode bidirectional overrides)
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)

# YAML 1.2.2 section 10.3.2, the core schema
_NULL = frozenset(("", "~", "null", "Null", "NULL"))
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

# what the types of YAML 1.1 (yaml.org/type) read otherwise
_OLD_BOOL = re.compile(r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF")
_OLD_NUMBER = re.compile(
    r"[-+]?0[0-9_]+|[-+]?0b[01_]+|0o[0-7]+|[-+]0x[0-9a-fA-F_]+|0x[0-9a-fA-F_]*_[0-9a-fA-F_]*"
    r"|[-+]?[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"
)
_OLD_DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single value, and where it stands."""

    mark: Mark
    value: str | int | float | bool | None
    variables: tuple[str, ...] = ()
    """The environment variables that the value was put together from; it must not be shown when there are any."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list, and where it begins."""

    mark: Mark
    items: list[Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Mapping:
    """Keys and values in the order of the file; ``marks`` says where each key stands."""

    mark: Mark
    entries: dict[str, Node] = field(default_factory=dict)
    marks: dict[str, Mark] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Broken:
    """Stands where a value was refused, so that reading can go on without a second fault for the same cause."""

    mark: Mark


Node = Scalar | Sequence | Mapping | Broken


class _Refused(Exception):
    """Nothing after this fault can be read."""


class _Ambiguous(Exception):
    """A plain word that readers of YAML disagree about."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


@dataclass(slots=True)
class _Frame:
    """A collection that is being read. ``key`` is the mapping's key that waits for its value."""

    node: Sequence | Mapping
    key: str | None = None
    has_key: bool = False
    is_refused: bool = False
    """Whether the collection carries a tag: its parts are read, and then it is dropped."""


def parse(text: str, file: str, loader: Any = _LOADER) -> tuple[Mapping | None, list[Fault]]:
    """Read one YAML document; the mapping is ``None`` when the file holds nothing that can be checked further."""
    reader = _Reader(file, text)
    try:
        reader.read(loader)
    except _Refused:
        return None, reader.faults
    root = reader.root
    if isinstance(root, Mapping):
        return root, reader.faults
    start = "start it with 'version: 1' and 'name: NAME'"
    if root is None or (isinstance(root, Scalar) and root.value is None):
        reader.fault(root.mark if root else Mark(file), "the file is empty", start)
    elif not isinstance(root, Broken):
        kind = "a list" if isinstance(root, Sequence) else "a single value"
        reader.fault(root.mark, f"the file holds {kind} where a mapping of keys belongs", start)
    return None, reader.faults


def read_plain(text: str) -> str | int | float | bool | None:
    """What an unquoted word means. Raises ``_Ambiguous`` for one that YAML 1.1 and 1.2 read differently."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    shown = shortened(text, 40)
    if _OLD_BOOL.fullmatch(text):
        claim = "true" if text.lower() in ("yes", "on") else "false"
        raise _Ambiguous(
            f"{text} is true or false to some readers of YAML and text to others",
            f'write {claim}, or "{text}" in quotes if it is text',
        )
    if _OLD_NUMBER.fullmatch(text):
        raise _Ambiguous(
            f"{shown} is read as different numbers, or as text, by different readers of YAML",
            f'write "{shown}" in quotes if it is text, or the number in plain decimal digits',
        )
    if _OLD_DATE.fullmatch(text):
        raise _Ambiguous(f"{shown} is a date to some readers of YAML and text to others", f'quote it: "{shown}"')
    if _NOT_FINITE.fullmatch(text):
        raise _Ambiguous(f"{text} is not a finite number", f'write a finite number, or "{text}" in quotes')
    if _INT.fullmatch(text) or _HEX.fullmatch(text):
        # the length first: int() refuses thousands of digits with an error of its own
        if len(text) > 20 or not -(2**63) <= (number := int(text, 0 if "x" in text else 10)) < 2**63:
            raise _Ambiguous(f"{shown} does not fit 64 bits", "write a smaller number, or quote it if it is text")
        return number
    if _FLOAT.fullmatch(text):
        value = float(text)
        if math.isinf(value):
            raise _Ambiguous(f"{shown} is not a finite number", "write a finite number, or quote it if it is text")
        return value
    return text


def shown(node: Node) -> str:
    """What a message may say of a value: never one that a variable is part of, nor more than 40 characters."""
    match node:
        case Scalar(variables=(_, *_) as names):
            return "the value of " + ", ".join(f"${{env.{name}}}" for name in names)
        case Scalar(value=str(text)):
            return repr(shortened(text, 40))
        case Scalar(value=None):
            return "nothing"
        case Scalar(value=bool(claim)):
            return "true" if claim else "false"
        case Scalar(value=number):
            return str(number)
        case Sequence():
            return "a list"
    return "a mapping of keys"


def unseen_characters(text: str) -> Iterator[re.Match[str]]:
    """The characters of the text that nobody sees, or that do not survive being written down."""
    return _UNSEEN.finditer(text)


class _Reader:
    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text
        self.faults: list[Fault] = []
        self.root: Node | None = None
        self._stack: list[_Frame] = []
        self._nodes = 0
        self._documents = 0

    def fault(self, mark: Mark, what: str, remedy: str, *keys: str) -> None:
        self.faults.append(Fault.at(mark, (*self._path(), *keys), what, remedy))

    def read(self, loader: Any) -> None:
        try:
            for event in yaml.parse(self.text, Loader=loader):
                self._take(event)
        except yaml.MarkedYAMLError as error:
            self._syntax(error)
            raise _Refused from None
        except yaml.YAMLError:
            self.fault(Mark(self.file), "not YAML that can be read", "write the file as UTF-8 text without escapes")
            raise _Refused from None

    def _take(self, event: yaml.Event) -> None:
        mark = self._mark(event.start_mark)
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self.fault(mark, "a second document begins here", "keep one document in the file and remove '---'")
                raise _Refused
        elif isinstance(event, yaml.AliasEvent):
            self.fault(mark, f"the alias *{event.anchor} is not allowed", "write the value out")
            self._attach(Broken(mark))
        elif isinstance(event, yaml.ScalarEvent):
            self._count(mark)
            is_refused = self._properties(event, mark)
            is_plain = event.implicit[0] and event.style in (None, "")
            self._attach(Broken(mark) if is_refused else self._scalar(event.value, is_plain, mark))
        elif isinstance(event, yaml.CollectionStartEvent):
            self._count(mark)
            is_refused = self._properties(event, mark)
            if len(self._stack) >= MAX_DEPTH:
                self.fault(mark, f"nested deeper than {MAX_DEPTH} levels", "flatten it")
                raise _Refused
            node = Mapping(mark) if isinstance(event, yaml.MappingStartEvent) else Sequence(mark)
            self._stack.append(_Frame(node, is_refused=is_refused))
        elif isinstance(event, yaml.CollectionEndEvent):
            frame = self._stack.pop()
            self._attach(Broken(frame.node.mark) if frame.is_refused else frame.node)

    def _scalar(self, text: str, is_plain: bool, mark: Mark) -> Scalar | Broken:
        hidden = next(unseen_characters(text), None)
        if hidden:
            self.fault(mark, f"holds the character U+{ord(hidden.group()):04X}, which nobody can see", "remove it")
            return Broken(mark)
        if not is_plain:
            return Scalar(mark, text)
        try:
            return Scalar(mark, read_plain(text))
        except _Ambiguous as refused:
            if is_secret(self._path()):
                self.fault(mark, "different readers of YAML take the value for different things", "put it in quotes")
            else:
                self.fault(mark, refused.what, refused.remedy)
            return Broken(mark)

    def _attach(self, node: Node) -> None:
        if not self._stack:
            self.root = node
            return
        frame = self._stack[-1]
        if isinstance(frame.node, Sequence):
            frame.node.items.append(node)
        elif not frame.has_key:
            frame.key, frame.has_key = self._key(node, frame.node), True
        else:
            if frame.key is not None:
                frame.node.entries[frame.key] = node
            frame.key, frame.has_key = None, False

    def _key(self, node: Node, mapping: Mapping) -> str | None:
        """The text of a key, noted in the mapping; ``None`` after a fault, and then its value is dropped."""
        if isinstance(node, Broken):
            return None
        if not isinstance(node, Scalar):
            self.fault(node.mark, "a list or mapping stands where a key belongs", "write the key as text")
            return None
        key = node.value
        if not isinstance(key, str):
            shown = "null" if key is None else str(key).lower() if isinstance(key, bool) else str(key)
            self.fault(node.mark, f"the key {shown} is not text", f'quote it: "{shown}"')
            return None
        if key == "<<":
            self.fault(
                node.mark, "merge keys are not allowed", "write the keys out, or build on a file with 'extends:'"
            )
            return None
        if "${" in key:
            self.fault(node.mark, "a key cannot hold a variable", "write the key out; ${env.NAME} is for values")
            return None
        if key in mapping.marks:
            first = mapping.marks[key].line
            self.fault(node.mark, f"the key is given twice, first on line {first}", "keep one of the two", key)
            return None
        mapping.marks[key] = node.mark
        return key

    def _properties(self, event: yaml.NodeEvent, mark: Mark) -> bool:
        """Refuse an anchor, which takes nothing from the value, and a tag, without which its meaning is unknown."""
        if event.anchor is not None:
            self.fault(mark, f"the anchor &{event.anchor} is not allowed", "remove it")
        tag = getattr(event, "tag", None)
        if tag is not None:
            shown = str(tag).replace("tag:yaml.org,2002:", "!!")
            self.fault(mark, f"the tag {shortened(shown)} is not allowed", "remove it; quote a value to make it text")
        return tag is not None

    def _count(self, mark: Mark) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            self.fault(mark, f"more than {MAX_NODES} keys and values", "split the file or remove what is not needed")
            raise _Refused

    def _path(self) -> Path:
        path: list[str | int] = []
        for frame in self._stack:
            if isinstance(frame.node, Sequence):
                path.append(len(frame.node.items))
            elif frame.key is not None:
                path.append(frame.key)
        return tuple(path)

    def _mark(self, mark: Any) -> Mark:
        return Mark(self.file, mark.line + 1, mark.column + 1)

    def _syntax(self, error: yaml.MarkedYAMLError) -> None:
        problem = error.problem or error.context or "unreadable"
        lines = self.text.splitlines()
        at = error.problem_mark or error.context_mark
        if at is not None and at.line >= len(lines) and error.context_mark is not None:
            at = error.context_mark  # where the quote or bracket begins that the file's end leaves open
        mark = self._mark(at) if at is not None else Mark(self.file)
        line = lines[mark.line - 1] if mark.line <= len(lines) else ""
        context = f" {error.context}" if error.context and error.context != problem else ""
        if "cannot start any token" in problem:
            found = line[mark.column - 1 : mark.column]
            context, problem = "", f"{'a tab' if found == chr(9) else repr(found)} cannot stand here"
        self.fault(mark, f"not valid YAML{context}: {problem}", _syntax_remedy(line, problem))


def _syntax_remedy(line: str, problem: str) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    if "\t" in indent:
        return "indent with spaces, not tabs"
    if "${" in line:
        return "put the value that holds ${...} in quotes"
    if "mapping values" in problem or "cannot stand here" in problem:
        return "put the value in quotes"
    return "check the indentation, brackets and quotes here and just above"

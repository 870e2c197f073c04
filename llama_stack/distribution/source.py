"""From a path to one tree of keys: reads the file, lays it over what it extends, and puts environment variables in.

Every value keeps the place where it was written, also across files, so that a later fault points there.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path as FilePath

from ..errors import listed
from . import nodes
from .faults import Fault, Mark, Path, shortened
from .nodes import Broken, Node, Scalar, Sequence, shown

MAX_EXTENDS = 8

_VARIABLE = re.compile(
    r"\$\$\{|\$\{env\.(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::(?P<default>[^}]*))?\}|\$\{[^}]*\}?", re.DOTALL
)
_SHELL_DEFAULT = ("-", "=", "+", "?")


@dataclass(frozen=True, slots=True)
class Source:
    """A distribution as text says it, before any model has looked at it."""

    root: nodes.Mapping | None
    """The keys, merged; ``None`` when the file itself cannot be read."""
    files: list[str]
    """The files read, the named one first, then what it extends in turn."""
    faults: list[Fault]
    hidden: Mapping[str, str] = field(repr=False)
    """The values of the variables that were put in, by name; no message may show them."""


def shipped_distributions() -> dict[str, FilePath]:
    """The distributions that come with the core, by name."""
    package = FilePath(__file__).parents[1]
    # in a wheel they lie inside the package, in a checkout beside it
    inside, beside = package / "distributions", package.parent / "distributions"
    return {path.stem: path for path in sorted((inside if inside.is_dir() else beside).glob("*.yaml"))}


def find_distribution(name: str) -> FilePath:
    """The file that a command line means: a path as it is, or a shipped distribution by its name.

    A name that is neither is returned as the path it would be, so that reading it reports what is missing.
    """
    return FilePath(name) if _is_path(name) else shipped_distributions().get(name, FilePath(name))


def read_source(path: str | os.PathLike[str], environ: Mapping[str, str]) -> Source:
    """Read a distribution's file and what it extends, and put the variables of ``environ`` in as text.

    Never raises for what the files hold: ``Source.faults`` has every fault, and the tree is as whole as it could be.
    """
    loader = _Files()
    top = os.fspath(path)
    root = loader.load(top)
    if root is None:
        return Source(None, loader.files, loader.faults, {})
    if "name" not in root.entries:
        remedy = "add a lowercase name, such as 'name: my-stack'"
        loader.faults.append(Fault.at(root.mark, ("name",), "the key is missing", remedy))
        root.entries["name"] = Broken(root.mark)
    variables = _Variables(environ)
    root = variables.fill_mapping(root, ())
    return Source(root, loader.files, [*loader.faults, *variables.faults], variables.used)


class _Files:
    """Reads files and lays them over one another."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.faults: list[Fault] = []
        self._chain: list[str] = []

    def load(self, path: str, named_at: Mark | None = None) -> nodes.Mapping | None:
        """The tree of a file with all that it extends; faults in opening it point at ``named_at`` when given."""
        text = self._text(path, named_at)
        if text is None:
            return None
        self.files.append(path)
        self._chain.append(path)
        root, faults = nodes.parse(text, path)
        self.faults += faults
        if root is None:
            return None
        self._version(root)
        base = self._base(root, path)
        return root if base is None else _laid_over(base, root)

    def _text(self, path: str, named_at: Mark | None) -> str | None:
        try:
            data = _read_bytes(path)
        except _Unreadable as error:
            prefix = f"cannot read {path}: " if named_at else ""
            at, keys = (named_at, ("extends",)) if named_at else (Mark(path), ())
            self.faults.append(Fault.at(at, keys, prefix + error.what, error.remedy))
            return None
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            before = data[: error.start].decode("utf-8-sig")
            mark = _mark_after(path, before)
            self.faults.append(Fault.at(mark, (), "the file is not UTF-8 text", "save the file in the encoding UTF-8"))
            return None
        hidden = list(nodes.unseen_characters(text))
        for found in hidden[:20]:
            what = f"the character U+{ord(found.group()):04X}, which nobody can see, stands here"
            self.faults.append(Fault.at(_mark_after(path, text[: found.start()]), (), what, "remove it"))
        return None if hidden else text

    def _version(self, root: nodes.Mapping) -> None:
        """The version belongs to the file, not to the tree: each file states its own."""
        node = root.entries.get("version")
        remedy = "this release reads version 1: write 'version: 1'"
        if node is None:
            self.faults.append(Fault.at(root.mark, ("version",), "the key is missing", remedy))
            root.entries["version"] = Broken(root.mark)
        elif isinstance(node, Scalar) and (node.value != 1 or not isinstance(node.value, int) or node.value is True):
            what = f"version {shown(node)} of the format is not known"
            if node.value == "1":
                what, remedy = "expected a whole number, got the text '1'", "write 1 without quotes"
            self.faults.append(Fault.at(node.mark, ("version",), what, remedy))
            root.entries["version"] = Broken(node.mark)

    def _base(self, root: nodes.Mapping, path: str) -> nodes.Mapping | None:
        node = root.entries.get("extends")
        if not isinstance(node, Scalar) or not isinstance(node.value, str) or not node.value:
            return None
        name = node.value
        if "${" in name:
            remedy = "write the name or the file out"
            self._refuse_base(root, node, "what a distribution extends cannot hang on a variable", remedy)
            return None
        if _is_path(name):
            base = os.path.normpath(os.path.join(os.path.dirname(path), name))
        else:
            shipped = shipped_distributions()
            if name not in shipped:
                remedy = f"name one of {listed(shipped)}, or a file, as in './{name}.yaml'"
                self._refuse_base(root, node, f"no shipped distribution is called {name!r}", remedy)
                return None
            base = str(shipped[name])
        known = [os.path.realpath(file) for file in self._chain]
        if os.path.realpath(base) in known:
            names = " -> ".join([*self._chain[known.index(os.path.realpath(base)) :], base])
            self._refuse_base(root, node, f"distributions extend one another in a circle: {names}", "break the circle")
            return None
        if len(self._chain) > MAX_EXTENDS:
            self._refuse_base(root, node, f"more than {MAX_EXTENDS} files extend one another", "merge some of them")
            return None
        found = self.load(base, named_at=node.mark)
        if found is not None:
            for own in ("version", "name", "extends"):
                found.entries.pop(own, None)
                found.marks.pop(own, None)
        return found

    def _refuse_base(self, root: nodes.Mapping, node: Scalar, what: str, remedy: str) -> None:
        self.faults.append(Fault.at(node.mark, ("extends",), what, remedy))
        root.entries["extends"] = Broken(node.mark)


class _Unreadable(Exception):
    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


class _Variables:
    """Puts environment variables into values, as text that nothing reads again."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.faults: list[Fault] = []
        self.used: dict[str, str] = {}

    def fill_mapping(self, mapping: nodes.Mapping, path: Path) -> nodes.Mapping:
        entries = {key: self._fill(node, (*path, key)) for key, node in mapping.entries.items()}
        return replace(mapping, entries=entries)

    def _fill(self, node: Node, path: Path) -> Node:
        match node:
            case nodes.Mapping():
                return self.fill_mapping(node, path)
            case Sequence():
                return replace(node, items=[self._fill(item, (*path, i)) for i, item in enumerate(node.items)])
            case Scalar(value=str(text)) if "${" in text:
                return self._scalar(node, text, path)
        return node

    def _scalar(self, node: Scalar, text: str, path: Path) -> Node:
        names: list[str] = []
        faults: list[Fault] = []

        def put_in(found: re.Match[str]) -> str:
            if found.group() == "$${":
                return "${"
            name, default = found["name"], found["default"]
            refused = _malformed(found.group(), name, default) or self._unusable(name, default)
            if refused:
                faults.append(Fault.at(node.mark, path, *refused))
                return ""
            names.append(name)
            if name in self.environ:
                self.used[name] = self.environ[name]
                return self.environ[name]
            return str(default)

        value = _VARIABLE.sub(put_in, text)
        self.faults += faults
        return Broken(node.mark) if faults else Scalar(node.mark, value, tuple(names))

    def _unusable(self, name: str, default: str | None) -> tuple[str, str] | None:
        value = self.environ.get(name)
        if value is None and default is None:
            return f"the environment variable {name} is not set", f"set {name}, or write ${{env.{name}:default}}"
        if value is not None and any(nodes.unseen_characters(value)):
            return f"the environment variable {name} holds bytes that are not text", f"set {name} to UTF-8 text"
        return None


def _malformed(text: str, name: str | None, default: str | None) -> tuple[str, str] | None:
    if name is None:
        if not text.endswith("}"):
            return (
                "a variable begins here with '${' and does not end",
                "close it with '}', or write $${ for a plain '${'",
            )
        meant = f"env.{text[2:-1]}" if re.fullmatch(r"\$\{[A-Za-z_]\w*\}", text) else "env.NAME"
        remedy = f"write ${{{meant}}} or ${{{meant}:default}}; $${{ stands for a plain '${{'"
        return f"{shortened(text)} is not a variable", remedy
    if default is not None and "${" in default:
        return "a default cannot hold another variable", "write the default out"
    if default is not None and default.startswith(_SHELL_DEFAULT):
        return f"the default of {name} begins with '{default[0]}', as in a shell", f"write ${{env.{name}:default}}"
    return None


def _laid_over(base: nodes.Mapping, over: nodes.Mapping) -> nodes.Mapping:
    """Mappings are merged key by key; anything else, lists included, is replaced whole."""
    entries, marks = dict(base.entries), base.marks | over.marks
    for key, node in over.entries.items():
        below = entries.get(key)
        both = isinstance(below, nodes.Mapping) and isinstance(node, nodes.Mapping)
        entries[key] = _laid_over(below, node) if both else node  # type: ignore[arg-type]  # both are mappings
    return nodes.Mapping(over.mark, entries, marks)


def _is_path(name: str) -> bool:
    return "/" in name or os.sep in name or name.endswith((".yaml", ".yml"))


def _read_bytes(path: str) -> bytes:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise _Unreadable("is a folder", "name a YAML file in it")
        if not stat.S_ISREG(status.st_mode):
            raise _Unreadable("is not a regular file", "name a YAML file")
        with open(path, "rb") as file:
            data = file.read(nodes.MAX_BYTES + 1)
    except FileNotFoundError:
        raise _Unreadable("no such file", _missing_remedy(path)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise _Unreadable(reason.lower(), "name a file that can be read") from None
    if len(data) > nodes.MAX_BYTES:
        raise _Unreadable(f"the file is larger than {nodes.MAX_BYTES} bytes", "keep data out of the distribution")
    return data


def _missing_remedy(path: str) -> str:
    folder, name = os.path.split(path)
    beside = [os.path.join(folder, other) for other in _yaml_files(folder or ".")]
    shipped = list(shipped_distributions())
    close = get_close_matches(name, [*(os.path.basename(other) for other in beside), *shipped], n=1)
    if close:
        return f"did you mean {close[0] if close[0] in shipped else os.path.join(folder, close[0])!r}?"
    return f"name a YAML file, or one of the shipped distributions: {listed(shipped)}"


def _yaml_files(folder: str) -> Iterator[str]:
    try:
        yield from (name for name in os.listdir(folder) if name.endswith((".yaml", ".yml")))
    except OSError:
        return


def _mark_after(file: str, text: str) -> Mark:
    lines = text.split("\n")
    return Mark(file, len(lines), len(lines[-1]) + 1)

"""The whole check of a distribution: its text, its keys, and whether what it names is installed and fits together.

Everything is looked at in one run, so that an operator reads all faults at once; nothing is started and nothing is
fetched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path as FilePath
from typing import Any, cast, get_args

from ..apis.config import Config, InnerProvider
from ..apis.contract import Api
from ..apis.models import Models
from ..errors import DistributionError, DuplicateProviderError, NotInstalledError, listed
from ..plugins import FaceSpec, ProviderSpec, ToolSpec
from ..registry import Installed, Registry, declaration_problems, needed_apis, needs
from . import nodes
from .faults import Fault, Mark, Path, in_order, key_path, shortened
from .models import Distribution, PluginFilter
from .nodes import Node, Scalar, Sequence
from .packages import Packages, is_installed, packages_of
from .source import Source, find_distribution, read_source
from .validation import validate


@dataclass(frozen=True)
class _Entry:
    """One provider of the distribution, as far as it could be made out."""

    api: type[Api]
    id: str
    spec: ProviderSpec
    mark: Mark
    path: Path
    shown_id: str
    """The id as a message may show it."""
    inner: tuple[_Entry, ...] = ()
    """The providers that its config names behind it."""

    @property
    def label(self) -> str:
        return f"{self.api.name}/{self.shown_id}"

    @property
    def whole(self) -> list[_Entry]:
        """The entry and those behind it, however deep."""
        return [self, *(entry for inner in self.inner for entry in inner.whole)]

    def needs(self, api: type[Api]) -> bool:
        """Whether it, or one behind it, asks for the API."""
        return any(api in needed_apis(entry.spec.start) for entry in self.whole)


def load_distribution(
    path: str | os.PathLike[str], *, environ: Mapping[str, str], registry: Registry | None = None
) -> Distribution:
    """The distribution in a file, or the shipped one of that name, checked against what is installed.

    ``registry`` is narrowed to the plugins that the distribution admits. Raises ``DistributionError`` with every fault.
    """
    distribution, faults, _ = _checked(path, environ, registry or Registry())
    if faults or distribution is None:
        raise DistributionError([str(fault) for fault in faults])
    return distribution


def check_distribution(
    path: str | os.PathLike[str], *, environ: Mapping[str, str], registry: Registry | None = None
) -> list[Fault]:
    """Every fault of a distribution, by file, line and column; empty when it can be started as far as one can tell."""
    distribution, faults, source = _checked(path, environ, registry or Registry())
    if distribution is not None and distribution.server.is_unguarded:  # not on load: a command line may name another
        faults = in_order([*faults, _unguarded(source)], source.files)
    return faults


def needed_packages(
    path: str | os.PathLike[str], *, environ: Mapping[str, str], registry: Registry | None = None
) -> Packages:
    """The packages that a distribution needs, which need not be installed.

    Raises ``DistributionError`` for one that cannot be read, or whose own keys are wrong.
    """
    registry = registry or Registry()
    distribution, faults, _ = _checked(path, environ, registry)
    if distribution is None:
        raise DistributionError([str(fault) for fault in faults])
    return packages_of(distribution, registry)


def _checked(
    path: str | os.PathLike[str], environ: Mapping[str, str], registry: Registry
) -> tuple[Distribution | None, list[Fault], Source]:
    source = read_source(find_distribution(os.fspath(path)), environ)
    if source.root is None:
        return None, in_order(source.faults, source.files), source
    faults = list(source.faults)
    distribution = validate(Distribution, source.root, (), source.hidden, faults)
    _add_folder(source.root, registry, faults)
    if _admits(source, registry):  # nothing is imported while it is not clear what may be
        _Check(source, registry, []).names(source.root)  # all that is named is imported now, and names taken twice show
        _Check(source, registry, faults).names(source.root)
    _requires(source.root, os.fspath(path), faults)
    return distribution, in_order(faults, source.files), source


def _requires(root: nodes.Mapping, path: str, faults: list[Fault]) -> None:
    """Refuse what ``requires`` names and is not installed; what is no requirement has been reported."""
    for index, item in enumerate(_items(root.entries.get("requires"))):
        if isinstance(item, Scalar) and isinstance(item.value, str) and not is_installed(item.value):
            name = f"${{env.{item.variables[0]}}}" if item.variables else shortened(item.value)
            remedy = f"run 'llama-stack install {path} --yes', or install it yourself"
            faults.append(Fault.at(item.mark, ("requires", index), f"the package {name} is not installed", remedy))


def _unguarded(source: Source) -> Fault:
    server = source.root.entries["server"] if source.root else None
    host = _text_of(server, "host") if server else None
    assert host is not None, "the default is no address of other machines"
    shown = f"${{env.{host.variables[0]}}}" if host.variables else repr(host.value)
    what = f"{shown} lets other machines in, and nothing here asks who they are"
    remedy = 'name the hosts that clients will use under server.allowed_hosts (["*"] for any), or set 127.0.0.1'
    return Fault.at(host.mark, ("server", "host"), what, remedy)


def _add_folder(root: nodes.Mapping, registry: Registry, faults: list[Fault]) -> None:
    """Show the registry the plugins in ``plugins_dir``, which is relative to the file that names it."""
    node = root.entries.get("plugins_dir")
    if not isinstance(node, Scalar) or not isinstance(node.value, str) or not node.value:
        return  # what is wrong with it has been reported with the other keys
    folder = os.path.join(os.path.dirname(node.mark.file), os.path.expanduser(node.value))
    try:
        registry.add_folder(FilePath(folder))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        what = f"the folder of plugins cannot be read: {reason.lower()}"
        faults.append(Fault.at(node.mark, ("plugins_dir",), what, "name a folder, relative to this file"))


def _admits(source: Source, registry: Registry) -> bool:
    """Narrow the registry to what the distribution admits, or return false when that cannot be read."""
    node = source.root.entries.get("plugins") if source.root else None
    if node is None:
        return True
    # what is wrong with it has been reported with the other keys
    found = validate(PluginFilter, node, (), source.hidden, []) if isinstance(node, nodes.Mapping) else None
    if found is not None:
        registry.admit(found.admits)
    return found is not None


_Started = ProviderSpec | ToolSpec | FaceSpec
_Find = Callable[[str], Installed[ToolSpec] | Installed[FaceSpec]]


class _Check:
    """Compares the names in a tree with a registry, and adds what does not fit to ``faults``."""

    def __init__(self, source: Source, registry: Registry, faults: list[Fault]) -> None:
        self.source, self.registry, self.faults = source, registry, faults
        self.served: set[type[Api]] = {Models}  # the stack itself provides the catalogue of models
        self.serves_unknown = False
        """Whether an API could not be made out; it may be the one that somebody needs."""

    def names(self, root: nodes.Mapping) -> None:
        self.providers(root)
        self.named(root, "tools", "tool", self.registry.tool)
        self.named(root, "faces", "face", self.registry.face)
        self.middleware(root)

    def providers(self, root: nodes.Mapping) -> None:
        entries: list[_Entry] = []
        apis = root.entries.get("providers")
        if not isinstance(apis, nodes.Mapping):
            self.serves_unknown = "providers" in root.entries
            return
        for name, node in apis.entries.items():
            path: Path = ("providers", name)
            try:
                api = self.registry.api(name)
            except (NotInstalledError, DuplicateProviderError) as error:
                self._refuse(apis.marks.get(name, node.mark), path, error)
                self.serves_unknown = True
                continue
            items = _items(node)
            self.served |= {api} if items else set()
            found = [self._provider(api, item, (*path, index)) for index, item in enumerate(items)]
            entries += [entry for entry in found if entry is not None]
        self._distinct(entries)
        for entry in (each for top in entries for each in top.whole):
            self._needs(entry.spec, f"provider {entry.spec.name!r}", entry.mark, entry.path)
        self._cycles(entries)

    def named(self, root: nodes.Mapping, section: str, key: str, find: _Find) -> None:
        """A section whose entries are known by their names alone: tools, and faces."""
        first: dict[str, Mark] = {}
        for index, item in enumerate(_items(root.entries.get(section))):
            name = _text_of(item, key)
            if name is None or not isinstance(item, nodes.Mapping):
                continue
            path: Path = (section, index)
            try:
                installed = find(str(name.value))
            except (NotInstalledError, DuplicateProviderError) as error:
                self._refuse(name, (*path, key), error)
                continue
            spec = installed.spec
            config = self._config(spec.config, item, path)
            if isinstance(spec, ToolSpec) and config is not None:
                self._permissions(cast("Installed[ToolSpec]", installed), config, item, path)
            given = _text_of(item, "id")
            id = str(given.value) if given is not None else spec.name
            if first.setdefault(id, name.mark) is not name.mark:
                what = f"the {key} {id!r} is on line {first[id].line} already"
                self._fault(name.mark, (*path, key), what, "keep one of the two")
            if self._is_sound(installed, f"{key} {spec.name!r}", name.mark, (*path, key)):
                self._needs(spec, f"{key} {spec.name!r}", name.mark, path)

    def middleware(self, root: nodes.Mapping) -> None:
        for index, item in enumerate(_items(root.entries.get("middleware"))):
            name = _text_of(item, "middleware")
            if name is not None and isinstance(item, nodes.Mapping):
                path: Path = ("middleware", index)
                try:
                    self._config(self.registry.middleware(str(name.value)).spec.config, item, path)
                except (NotInstalledError, DuplicateProviderError) as error:
                    self._refuse(name, (*path, "middleware"), error)

    def _provider(self, api: type[Api], item: Node, path: Path) -> _Entry | None:
        name = _text_of(item, "provider")
        if name is None or not isinstance(item, nodes.Mapping):
            return None
        try:
            installed = self.registry.provider(api, str(name.value))
        except (NotInstalledError, DuplicateProviderError) as error:
            self._refuse(name, (*path, "provider"), error)
            return None
        spec = installed.spec
        self._config(spec.config, item, path)
        inner = self._inner(api, spec.config, item, path)
        if not self._is_sound(installed, f"provider {spec.name!r}", name.mark, (*path, "provider")):
            return None
        given = _text_of(item, "id")
        if given is None:
            return _Entry(api, spec.name, spec, name.mark, path, spec.name, inner)
        shown_id = f"${{env.{given.variables[0]}}}" if given.variables else str(given.value)
        return _Entry(api, str(given.value), spec, given.mark, path, shown_id, inner)

    def _inner(self, api: type[Api], model: type[Config], item: nodes.Mapping, path: Path) -> tuple[_Entry, ...]:
        """The providers that a config names behind this one."""
        config = item.entries.get("config")
        if not isinstance(config, nodes.Mapping):
            return ()
        found: list[_Entry | None] = []
        for key, node in config.entries.items():
            if key in model.model_fields and _names_providers(model.model_fields[key].annotation):
                within = (*path, "config", key)
                if isinstance(node, Sequence):
                    found += [self._provider(api, each, (*within, i)) for i, each in enumerate(node.items)]
                else:
                    found.append(self._provider(api, node, within))
        entries = [entry for entry in found if entry is not None]
        self._distinct(entries)
        return tuple(entries)

    def _is_sound(self, installed: Installed[_Started], who: str, mark: Mark, path: Path) -> bool:
        problems = declaration_problems(installed.spec)
        for problem in problems:
            what = f"{who} of {installed.plugin.label} is not made as it should be: {problem}"
            self._fault(mark, path, what, f"report it to the authors of {installed.plugin.package}")
        return not problems

    def _config(self, model: type[Config], item: nodes.Mapping, path: Path) -> Config | None:
        node = item.entries.get("config", nodes.Mapping(item.mark))
        if isinstance(node, nodes.Mapping):
            if "config" in item.marks and not node.entries:
                node = nodes.Mapping(item.marks["config"])
            return validate(model, node, (*path, "config"), self.source.hidden, self.faults)
        return None

    def _permissions(self, installed: Installed[ToolSpec], config: Config, item: nodes.Mapping, path: Path) -> None:
        """A permission that a tool asks for and its entry does not grant."""
        spec, mark = installed.spec, item.marks.get("permissions", item.mark)
        granted = {each.value for each in _items(item.entries.get("permissions")) if isinstance(each, Scalar)}
        try:
            asked = spec.asked(config)
        except Exception as error:  # a plugin's
            what = f"tool {spec.name!r} of {installed.plugin.label} cannot say what it asks for: {error!r}"
            self._fault(mark, path, what, f"report it to the authors of {installed.plugin.package}")
            return
        if missing := [permission.value for permission in asked if permission not in granted]:
            remedy = f"if it may touch that, write 'permissions: [{', '.join(asked)}]'"
            what = f"tool {spec.name!r} asks for {listed(missing)}, which its entry does not permit"
            self._fault(mark, (*path, "permissions"), what, remedy)

    def _distinct(self, entries: list[_Entry]) -> None:
        first: dict[tuple[type[Api], str], _Entry] = {}
        for entry in entries:
            other = first.setdefault((entry.api, entry.id), entry)
            if other is not entry:
                what = f"the id {entry.shown_id!r} is taken by {key_path(other.path)} on line {other.mark.line}"
                self._fault(entry.mark, (*entry.path, "id"), what, "give this provider another 'id:'")

    def _needs(self, spec: _Started, who: str, mark: Mark, path: Path) -> None:
        if self.serves_unknown:
            return
        for need in needs(spec.start):
            if need.api and not need.is_optional and need.api not in self.served:
                installed = [found.spec.name for found in self.registry.providers() if found.spec.api is need.api]
                what = f"{who} needs the API {need.api.name!r}, which has no provider here"
                self._fault(mark, path, what, f"add a provider of {need.api.name!r}; installed: {listed(installed)}")

    def _cycles(self, entries: list[_Entry]) -> None:
        left = list(entries)
        while left:
            graph = {entry: [other for other in left if entry.needs(other.api)] for entry in left}
            try:
                TopologicalSorter(graph).prepare()
            except CycleError as error:
                circle: list[_Entry] = error.args[1]
                entry = min(circle, key=entries.index)
                names = " -> ".join(other.label for other in reversed(circle))
                what = f"providers need one another in a circle: {names}"
                self._fault(entry.mark, entry.path, what, "remove one of them, or choose one that needs less")
                left = [other for other in left if other not in circle]  # and look for another circle
            else:
                return

    def _refuse(self, name: Mark | Scalar, path: Path, error: NotInstalledError | DuplicateProviderError) -> None:
        what, _, remedy = error.detail.partition("; ")
        if isinstance(error, NotInstalledError):
            what, remedy = error.what, error.remedy
        if isinstance(name, Scalar):
            if name.variables:
                what = what.replace(repr(name.value), f"${{env.{name.variables[0]}}}")
            name = name.mark
        self._fault(name, path, what, remedy)

    def _fault(self, mark: Mark, path: Path, what: str, remedy: str) -> None:
        self.faults.append(Fault.at(mark, path, what, remedy))


def _names_providers(annotation: Any) -> bool:
    """Whether a field of this type holds providers that stand behind one."""
    return annotation is InnerProvider or any(_names_providers(inner) for inner in get_args(annotation))


def _items(node: Node | None) -> list[Node]:
    return node.items if isinstance(node, Sequence) else []


def _text_of(item: Node, key: str) -> Scalar | None:
    """The value of a key where it is text; what else it may be has been reported with the other keys."""
    found = item.entries.get(key) if isinstance(item, nodes.Mapping) else None
    return found if isinstance(found, Scalar) and isinstance(found.value, str) else None

"""The whole check of a distribution: its text, its keys, and whether what it names is installed and fits together.

Everything is looked at in one run, so that an operator reads all faults at once; nothing is started and nothing is
fetched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from ..apis.config import Config
from ..apis.contract import Api
from ..apis.models import Models
from ..errors import DistributionError, DuplicateProviderError, NotInstalledError, listed
from ..plugins import ProviderSpec
from ..registry import NeedKind, Registry, declaration_problems, needs
from . import nodes
from .faults import Fault, Mark, Path, in_order, key_path
from .models import Distribution, PluginFilter
from .nodes import Node, Scalar, Sequence
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

    @property
    def label(self) -> str:
        return f"{self.api.name}/{self.shown_id}"


def load_distribution(
    path: str | os.PathLike[str], *, environ: Mapping[str, str], registry: Registry | None = None
) -> Distribution:
    """The distribution in a file, or the shipped one of that name, checked against what is installed.

    ``registry`` is narrowed to the plugins that the distribution admits. Raises ``DistributionError`` with every fault.
    """
    distribution, faults = _checked(path, environ, registry or Registry())
    if faults or distribution is None:
        raise DistributionError([str(fault) for fault in faults])
    return distribution


def check_distribution(
    path: str | os.PathLike[str], *, environ: Mapping[str, str], registry: Registry | None = None
) -> list[Fault]:
    """Every fault of a distribution, by file, line and column; empty when it can be started as far as one can tell."""
    return _checked(path, environ, registry or Registry())[1]


def _checked(
    path: str | os.PathLike[str], environ: Mapping[str, str], registry: Registry
) -> tuple[Distribution | None, list[Fault]]:
    source = read_source(find_distribution(os.fspath(path)), environ)
    if source.root is None:
        return None, in_order(source.faults, source.files)
    faults = list(source.faults)
    distribution = validate(Distribution, source.root, (), source.hidden, faults)
    check = _Check(source, registry, faults)
    check.admit(source.root)
    check.providers(source.root)
    check.parts(source.root)
    return distribution, in_order(faults, source.files)


class _Check:
    """Compares the names in a tree with a registry, and adds what does not fit to ``faults``."""

    def __init__(self, source: Source, registry: Registry, faults: list[Fault]) -> None:
        self.source, self.registry, self.faults = source, registry, faults

    def admit(self, root: nodes.Mapping) -> None:
        node = root.entries.get("plugins")
        if isinstance(node, nodes.Mapping):
            found = validate(PluginFilter, node, ("plugins",), self.source.hidden, [])  # its faults are known already
            if found is not None:
                self.registry.admit(found.admits)

    def providers(self, root: nodes.Mapping) -> None:
        entries: list[_Entry] = []
        is_whole = True
        apis = root.entries.get("providers")
        if not isinstance(apis, nodes.Mapping):
            return
        served: set[type[Api]] = {Models}  # the stack itself provides the catalogue of models
        for name, node in apis.entries.items():
            path: Path = ("providers", name)
            try:
                api = self.registry.api(name)
            except (NotInstalledError, DuplicateProviderError) as error:
                self._refuse(apis.marks.get(name, node.mark), path, error)
                is_whole = False
                continue
            items = node.items if isinstance(node, Sequence) else []
            served |= {api} if items else set()
            for index, item in enumerate(items):
                entry = self._provider(api, item, (*path, index))
                is_whole = is_whole and entry is not None
                entries += [entry] if entry else []
        self._distinct(entries)
        self._needs(entries, served if is_whole else None)
        self._cycles(entries)

    def parts(self, root: nodes.Mapping) -> None:
        """Faces and middlewares."""
        finders = (("faces", "face", self.registry.face), ("middleware", "middleware", self.registry.middleware))
        for section, key, find in finders:
            node = root.entries.get(section)
            for index, item in enumerate(node.items if isinstance(node, Sequence) else []):
                name = item.entries.get(key) if isinstance(item, nodes.Mapping) else None
                if isinstance(item, nodes.Mapping) and isinstance(name, Scalar) and isinstance(name.value, str):
                    path: Path = (section, index)
                    try:
                        spec = find(name.value).spec
                    except (NotInstalledError, DuplicateProviderError) as error:
                        self._refuse(name, (*path, key), error)
                        continue
                    self._config(spec.config, item, path)

    def _provider(self, api: type[Api], item: Node, path: Path) -> _Entry | None:
        name = item.entries.get("provider") if isinstance(item, nodes.Mapping) else None
        if not isinstance(item, nodes.Mapping) or not isinstance(name, Scalar) or not isinstance(name.value, str):
            return None
        try:
            installed = self.registry.provider(api, name.value)
        except (NotInstalledError, DuplicateProviderError) as error:
            self._refuse(name, (*path, "provider"), error)
            return None
        spec = installed.spec
        self._config(spec.config, item, path)
        problems = declaration_problems(spec)
        for problem in problems:
            what = f"provider {spec.name!r} of {installed.plugin.label} is not made as its API asks: {problem}"
            self._fault(name.mark, (*path, "provider"), what, "report it to the authors of the plugin")
        if problems:
            return None
        given = item.entries.get("id")
        if isinstance(given, Scalar) and isinstance(given.value, str):
            shown_id = f"${{env.{given.variables[0]}}}" if given.variables else given.value
            return _Entry(api, given.value, spec, given.mark, path, shown_id)
        return _Entry(api, spec.name, spec, name.mark, path, spec.name)

    def _config(self, model: type[Config], item: nodes.Mapping, path: Path) -> None:
        node = item.entries.get("config", nodes.Mapping(item.mark))
        if isinstance(node, nodes.Mapping):
            if "config" in item.marks and not node.entries:
                node = nodes.Mapping(item.marks["config"])
            validate(model, node, (*path, "config"), self.source.hidden, self.faults)

    def _distinct(self, entries: list[_Entry]) -> None:
        first: dict[tuple[type[Api], str], _Entry] = {}
        for entry in entries:
            other = first.setdefault((entry.api, entry.id), entry)
            if other is not entry:
                what = f"the id {entry.shown_id!r} is taken by {key_path(other.path)} on line {other.mark.line}"
                self._fault(entry.mark, (*entry.path, "id"), what, "give this provider another 'id:'")

    def _needs(self, entries: list[_Entry], served: set[type[Api]] | None) -> None:
        """What is needed and not served; unknown while the list of served APIs has faults of its own."""
        if served is None:
            return
        for entry in entries:
            for need in needs(entry.spec.start):
                if need.kind is NeedKind.API and need.api and not need.is_optional and need.api not in served:
                    api = need.api.name
                    choices = listed(
                        found.spec.name for found in self.registry.providers() if found.spec.api is need.api
                    )
                    what = f"provider {entry.spec.name!r} needs the API {api!r}, which has no provider here"
                    self._fault(entry.mark, entry.path, what, f"add a provider of {api!r}; installed: {choices}")

    def _cycles(self, entries: list[_Entry]) -> None:
        left = list(entries)
        while left:
            graph = {entry: [other for other in left if other.api in _needed(entry)] for entry in left}
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


def _needed(entry: _Entry) -> Iterator[type[Api]]:
    return (need.api for need in needs(entry.spec.start) if need.kind is NeedKind.API and need.api)

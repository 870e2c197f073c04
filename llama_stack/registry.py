"""What is installed, by name: APIs, providers, tools, faces, commands and middlewares, and which plugin brings each.

Looking a name up imports the plugins whose entry points carry it, and only when they do not declare it the others. What
runs is ``stack``'s.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

from . import __version__
from .apis import APIS
from .apis.config import Config
from .apis.contract import Api, operations
from .errors import ContractMismatchError, DuplicateProviderError, NotInstalledError, PluginLoadError, listed, nearest
from .inner import Inner
from .plugins import (
    ApiSpec,
    CommandSpec,
    FaceSpec,
    MiddlewareSpec,
    Plugin,
    ProviderSpec,
    Spec,
    Start,
    ToolSpec,
    discover,
    in_folder,
    load,
)
from .signatures import annotation_of, contract_problems
from .storage import Blobs, Database, Folder
from .tools import Tools

S = TypeVar("S", bound=Spec, covariant=True)

_Key = tuple[Any, ...]
"""The class of a record, the API where it is a provider, and the name."""

CORE = Plugin(("llama-stack",), f"llama-stack {__version__}", "llama_stack")


@dataclass(frozen=True, slots=True)
class Installed(Generic[S]):
    """Something that a plugin declares."""

    spec: S
    plugin: Plugin


class NeedKind(StrEnum):
    """What a start function may ask for."""

    CONFIG = "config"
    API = "api"
    DATABASE = "database"
    BLOBS = "blobs"
    FOLDER = "folder"
    TOOLS = "tools"
    INNER = "inner"


@dataclass(frozen=True, slots=True)
class Need:
    """One parameter of a start function."""

    parameter: str
    kind: NeedKind
    api: type[Api] | None = None
    """The contract asked for, when ``kind`` is ``API``."""
    is_optional: bool = False
    """Whether ``None`` is passed where the distribution does not serve the API."""


class Registry:
    """The installed plugins and what they declare; each plugin is imported when it is first needed."""

    def __init__(self, plugins: Iterable[Plugin] | None = None) -> None:
        """``plugins`` are those that ``discover`` finds when left out."""
        self.plugins: list[Plugin] = discover() if plugins is None else list(plugins)
        self.denied: list[Plugin] = []
        """Installed plugins that the distribution does not admit; nothing of them is imported."""
        self._loaded: dict[Plugin, tuple[Spec, ...]] = {}
        self._faults: dict[Plugin, PluginLoadError] = {}
        self._table: dict[_Key, list[Installed[Any]]] = {}
        for api in APIS:
            self._table[_key(ApiSpec(api=api))] = [Installed(ApiSpec(api=api), CORE)]

    @property
    def loaded(self) -> list[Plugin]:
        """The plugins that have been imported so far."""
        return list(self._loaded)

    @property
    def faults(self) -> list[PluginLoadError]:
        """What was wrong with the plugins that could not be loaded so far."""
        return list(self._faults.values())

    @property
    def duplicates(self) -> list[DuplicateProviderError]:
        """What more than one of the plugins loaded so far declares."""
        return [_duplicate(found) for found in self._table.values() if len(found) > 1]

    def add_folder(self, folder: Path) -> None:
        """Know the plugins of one file in a folder too. Raises ``OSError`` for one that cannot be read."""
        known = {plugin.file for plugin in self.plugins}
        self.plugins += [plugin for plugin in in_folder(folder) if plugin.file not in known]

    def admit(self, is_admitted: Callable[..., bool]) -> None:
        """Narrow the registry to plugins for whose names and package ``is_admitted`` holds; call it before look-ups."""
        denied = [p for p in self.plugins if p.loaded is None and not is_admitted(*p.names, p.package)]
        self.denied += denied
        self.plugins = [plugin for plugin in self.plugins if plugin not in denied]

    def api(self, name: str) -> type[Api]:
        """The contract of that name. Raises ``NotInstalledError`` or ``DuplicateProviderError``."""
        return self.declared_api(name).spec.api

    def declared_api(self, name: str) -> Installed[ApiSpec]:
        """The contract of that name and the plugin that brings it. Raises as ``api`` does."""
        return self._find((ApiSpec, name), f"API {name!r}")

    def provider(self, api: type[Api], name: str) -> Installed[ProviderSpec]:
        """The provider of that name for the API. Raises ``NotInstalledError`` or ``DuplicateProviderError``."""
        return self._find((ProviderSpec, api, name), f"provider {name!r} of {api.name!r}")

    def tool(self, name: str) -> Installed[ToolSpec]:
        """The tool of that name. Raises ``NotInstalledError`` or ``DuplicateProviderError``."""
        return self._find((ToolSpec, name), f"tool {name!r}")

    def face(self, name: str) -> Installed[FaceSpec]:
        """The face of that name. Raises ``NotInstalledError`` or ``DuplicateProviderError``."""
        return self._find((FaceSpec, name), f"face {name!r}")

    def command(self, name: str) -> Installed[CommandSpec]:
        """The command of that name. Raises ``NotInstalledError`` or ``DuplicateProviderError``."""
        return self._find((CommandSpec, name), f"command {name!r}")

    def middleware(self, name: str) -> Installed[MiddlewareSpec]:
        """The middleware of that name. Raises ``NotInstalledError`` or ``DuplicateProviderError``."""
        return self._find((MiddlewareSpec, name), f"middleware {name!r}")

    def apis(self) -> list[Installed[ApiSpec]]:
        """All contracts, the core's first. Loads every plugin."""
        return list(self._all(ApiSpec))

    def providers(self) -> list[Installed[ProviderSpec]]:
        """All providers, by API and name. Loads every plugin."""
        return sorted(self._all(ProviderSpec), key=lambda found: (found.spec.api.name, found.spec.name))

    def tools(self) -> list[Installed[ToolSpec]]:
        """All tools by name. Loads every plugin."""
        return sorted(self._all(ToolSpec), key=lambda found: found.spec.name)

    def faces(self) -> list[Installed[FaceSpec]]:
        """All faces by name. Loads every plugin."""
        return sorted(self._all(FaceSpec), key=lambda found: found.spec.name)

    def commands(self) -> list[Installed[CommandSpec]]:
        """All commands by name. Loads every plugin."""
        return sorted(self._all(CommandSpec), key=lambda found: found.spec.name)

    def middlewares(self) -> list[Installed[MiddlewareSpec]]:
        """All middlewares by name. Loads every plugin."""
        return sorted(self._all(MiddlewareSpec), key=lambda found: found.spec.name)

    def load_all(self) -> None:
        """Import every admitted plugin; the ones that fail are in ``faults``."""
        for plugin in self.plugins:
            self._load(plugin)

    def fault_of(self, plugin: Plugin) -> PluginLoadError | None:
        """Why the plugin could not be loaded, if it was tried and failed."""
        return self._faults.get(plugin)

    def _find(self, key: _Key, described: str) -> Installed[Any]:
        name = key[-1]
        for plugin in self.plugins:
            if plugin.loaded is not None or name in plugin.names:
                self._load(plugin)
        if key not in self._table:
            self.load_all()
        found = self._table.get(key)
        if found is None:
            raise self._not_installed(key, described)
        if len(found) > 1:
            raise _duplicate(found)
        return found[0]

    def _load(self, plugin: Plugin) -> None:
        if plugin in self._loaded or plugin in self._faults:
            return
        try:
            specs = load(plugin, self._contracts())
            self._check(plugin, specs)
        except PluginLoadError as fault:
            self._faults[plugin] = fault
            return
        self._loaded[plugin] = specs
        for spec in specs:
            self._table.setdefault(_key(spec), []).append(Installed(spec, plugin))
        if added := _apis_of(specs):
            self._provide(added)

    def _provide(self, added: list[type[Api]]) -> None:
        """Ask the plugins that are loaded already whether they provide these contracts too."""
        for plugin, known in list(self._loaded.items()):
            keys = {_key(spec) for spec in known}
            try:
                declared = load(plugin, added)
            except PluginLoadError as fault:
                self._faults[plugin] = fault
                continue
            more = [
                spec
                for spec in declared
                if isinstance(spec, ProviderSpec) and spec.api in added and _key(spec) not in keys
            ]
            self._loaded[plugin] = (*known, *more)
            for spec in more:
                self._table.setdefault(_key(spec), []).append(Installed(spec, plugin))

    def _contracts(self) -> list[type[Api]]:
        return [found[0].spec.api for key, found in self._table.items() if key[0] is ApiSpec]

    def _check(self, plugin: Plugin, specs: tuple[Spec, ...]) -> None:
        keys = [_key(spec) for spec in specs]
        for spec, key in zip(specs, keys, strict=True):
            if keys.count(key) > 1:
                raise plugin.fault(f"it declares {_described(spec)} twice", "declare it once")
        added = _apis_of(specs)
        names = {api.name for api in added}
        # two packages that declare one API are told apart when it is looked up, not here
        taken = {op.key: op for api in self._contracts() if api.name not in names for op in operations(api)}
        for api in added:
            if api.name in {ours.name for ours in APIS}:
                raise plugin.fault(
                    f"it declares the API {api.name!r}, which llama-stack brings", "give it another name"
                )
            for operation in operations(api):
                other = taken.setdefault(operation.key, operation)
                if other is not operation:
                    what = f"its API {api.name!r} has the operation {operation.key}, which {other.api.name!r} has"
                    raise plugin.fault(what, "choose another path")

    def _not_installed(self, key: _Key, described: str) -> NotInstalledError:
        name = str(key[-1])
        if failed := _called(name, self._faults):
            fault = self._faults[failed]
            what = f"the plugin that brings the {described} cannot be loaded: {fault.cause}"
            return NotInstalledError(what, fault.remedy)
        what = f"no installed plugin declares the {described}"
        if denied := _called(name, self.denied):
            remedy = f"admit {denied.name!r} of {denied.package} under 'plugins:'"
            return NotInstalledError(f"the plugin that brings the {described} is not admitted", remedy)
        elsewhere = [other[1].name for other in self._table if (other[0], other[-1]) == (ProviderSpec, name)]
        if key[0] is ProviderSpec and elsewhere:
            return NotInstalledError(what, f"{name!r} provides {listed(elsewhere)}")
        known = [str(other[-1]) for other in self._table if other[:-1] == key[:-1]]
        close = nearest(name, known).removeprefix("; ")
        if close:
            return NotInstalledError(what, close)
        remedy = f"installed: {listed(known)}"
        if self._faults:
            suspects = "; ".join(f"{fault.plugin} of {fault.package} ({fault.cause})" for fault in self.faults)
            remedy += f"; or it is in a plugin that could not be loaded: {suspects}"
        return NotInstalledError(what, remedy)

    def _all(self, record: type[Any]) -> Iterator[Installed[Any]]:
        self.load_all()
        for found in self._table.values():
            yield from (installed for installed in found if isinstance(installed.spec, record))


@cache
def needs(start: Start) -> tuple[Need, ...]:
    """What a start function asks for, parameter by parameter, read off its annotations.

    Raises ``ContractMismatchError`` naming the parameters that ask for nothing the stack has.
    """
    function = inspect.unwrap(start)
    found: list[Need] = []
    problems: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        try:
            found.append(_need(function, parameter))
        except _Unmet as problem:
            problems.append(f"parameter {parameter.name!r} {problem}")
    if problems:
        raise ContractMismatchError(_location(start), problems)
    return tuple(found)


def needed_apis(start: Start) -> list[type[Api]]:
    """The contracts that a start function asks for, also those that it can do without."""
    return [need.api for need in needs(start) if need.api is not None]


def declaration_problems(spec: ProviderSpec | ToolSpec | FaceSpec) -> list[str]:
    """What is wrong with a declaration before anything is started: its needs, its config, and the type it yields."""
    try:
        asked = needs(spec.start)
    except ContractMismatchError as error:
        return list(error.problems)
    problems: list[str] = []
    for need in asked:
        if need.kind is NeedKind.CONFIG:
            wanted = _without_none(annotation_of(spec.start, need.parameter))
            if not issubclass(spec.config, wanted):
                problems.append(
                    f"parameter {need.parameter!r} is {wanted.__name__}, and config= {spec.config.__name__}"
                )
    if isinstance(spec, ProviderSpec):
        problems += _yield_problems(spec)
    return problems


def check_provider(spec: ProviderSpec, provider: object, *, is_alone: bool = True) -> None:
    """Raise ``ContractMismatchError`` unless the started object keeps the contract of its API, method by method.

    One that is not alone, because the distribution has other providers of the API, must also say what it owns.
    """
    if not isinstance(provider, Api):
        wanted = spec.api.__name__
        raise ContractMismatchError(spec.name, [f"it yields {type(provider).__name__}, not a subclass of {wanted}"])
    problems = contract_problems(type(provider), spec.api)
    if not is_alone and type(provider).owns is Api.owns and any(op.resource for op in operations(spec.api)):
        problems.append("owns is missing, by which requests find their provider where an API has several")
    if problems:
        raise ContractMismatchError(spec.name, problems)


_PASSED = "a config, contracts, Database, Blobs, Folder, Tools and Inner"


class _Unmet(Exception):
    """Why a parameter cannot be passed."""


def _need(function: Callable[..., Any], parameter: inspect.Parameter) -> Need:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
        raise _Unmet("cannot be passed by its name")
    try:
        annotation = annotation_of(function, parameter.name)
    except NameError as error:
        raise _Unmet(f"has a type that cannot be read at run time ({error})") from error
    if annotation is inspect.Parameter.empty:
        raise _Unmet(
            "has no type, and the stack passes a config, contracts, Database, Blobs, Folder, Tools and Inner by it"
        )
    wanted = _without_none(annotation)
    is_optional = wanted is not annotation
    if isinstance(wanted, type):
        if issubclass(wanted, Config):
            return Need(parameter.name, NeedKind.CONFIG)
        if issubclass(wanted, Api) and hasattr(wanted, "tag"):
            if "tag" not in vars(wanted):
                raise _Unmet(
                    f"asks for {wanted.__name__}, which is a provider, where its contract {wanted.tag} belongs"
                )
            return Need(parameter.name, NeedKind.API, wanted, is_optional)
        if wanted is Database:
            return Need(parameter.name, NeedKind.DATABASE)
        if wanted is Blobs:
            return Need(parameter.name, NeedKind.BLOBS)
        if wanted is Folder:
            return Need(parameter.name, NeedKind.FOLDER)
        if wanted is Tools:
            return Need(parameter.name, NeedKind.TOOLS)
        if wanted is Inner:
            return Need(parameter.name, NeedKind.INNER)
    shown = getattr(wanted, "__name__", str(wanted))
    raise _Unmet(
        f"asks for {shown}, and the stack passes a config, contracts, Database, Blobs, Folder, Tools and Inner"
    )


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        kept = [choice for choice in get_args(annotation) if choice is not type(None)]
        return kept[0] if len(kept) == 1 else annotation
    return annotation


def _yield_problems(spec: ProviderSpec) -> list[str]:
    try:
        returned = annotation_of(spec.start, "return")
    except NameError:
        return []  # a class imported for the type checker alone; the started object is checked instead
    iterators = (AsyncIterator, AsyncGenerator, AbstractAsyncContextManager)
    yielded = get_args(returned)[0] if get_origin(returned) in iterators and get_args(returned) else None
    if not (isinstance(yielded, type) and issubclass(yielded, Api)):
        return [f"its start function is not annotated '-> AsyncIterator[{spec.api.__name__}]'"]
    return contract_problems(yielded, spec.api) if yielded is not spec.api else []


def _location(start: Start) -> str:
    function = inspect.unwrap(start)
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"


def _key(spec: Spec) -> _Key:
    if isinstance(spec, ProviderSpec):
        return (ProviderSpec, spec.api, spec.name)
    return (type(spec), spec.name)


def _called(name: str, plugins: Iterable[Plugin]) -> Plugin | None:
    """The plugin that is known by that name, as an entry point or as a package."""
    return next((plugin for plugin in plugins if name in (*plugin.names, plugin.package)), None)


def _described(spec: Spec) -> str:
    if isinstance(spec, ProviderSpec):
        return f"provider {spec.name!r} of {spec.api.name!r}"
    return f"{type(spec).__name__.removesuffix('Spec').lower()} {spec.name!r}"


def _duplicate(found: list[Installed[Any]]) -> DuplicateProviderError:
    return DuplicateProviderError(_described(found[0].spec), found[0].plugin.label, found[1].plugin.label)


def _apis_of(specs: Iterable[Spec]) -> list[type[Api]]:
    return [spec.api for spec in specs if isinstance(spec, ApiSpec)]

"""What a plugin may bring, the hooks by which it says so, and the discovery that one broken plugin cannot stop.

A plugin is a module that an installed package names in the entry-point group ``llama_stack``::

    [project.entry-points.llama_stack]
    keyword = "llama_stack_keyword.plugin"

Name each entry for what it brings: a distribution that says ``provider: keyword`` then imports this module and no
other. A plugin that brings several things lists the same module under each of their names. What no entry is named for
is still found, by importing the plugins that are left. A plugin of one file needs no package: it lies in a folder that
the distribution names (``plugins_dir``), and its file's name takes the place of the entry's.

The module implements the hooks below with ``hookimpl``. Hooks are synchronous and cheap, and are called before anything
is started: they return declarations, and whatever is heavy waits until a distribution names it.
"""

# mypy: disable-error-code="empty-body"
# hook specifications are never called: their docstrings are all there is to them

from __future__ import annotations

import ast
import importlib
import inspect
import operator
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from .apis import APIS
from .apis.config import Config, NoConfig
from .apis.contract import Api, contract_of, operations
from .errors import PluginLoadError, nearest
from .signatures import annotation_of
from .tools import Permission, Tool, ToolSource

if TYPE_CHECKING:
    from click import Command

__all__ = [  # what plugins and the registry import from here; a ``Tool`` is what a ``ToolSpec`` starts
    "API_VERSION",
    "GROUP",
    "ApiSpec",
    "CommandSpec",
    "FaceSpec",
    "MiddlewareSpec",
    "Permission",
    "Plugin",
    "ProviderSpec",
    "Spec",
    "Start",
    "Tool",
    "ToolSource",
    "ToolSpec",
    "discover",
    "hookimpl",
    "hookspec",
    "in_folder",
    "load",
    "provides",
]

GROUP = "llama_stack"
API_VERSION = (1, 0)
"""The version of this interface. The second number grows when something is added, the first when something goes."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)

_VERSION = "llama_stack_api_version"
"""The name under which a plugin's module says for which versions of this interface it was made."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_CLAUSE = re.compile(r"\s*(>=|<=|==|>|<)\s*([0-9]{1,6})(?:\.([0-9]{1,6}))?\s*")
_COMPARE: Mapping[str, Callable[[tuple[int, int], tuple[int, int]], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}

Start = Callable[..., AbstractAsyncContextManager[Any]]
"""An async context manager function whose parameters are its needs, as ``registry.needs`` reads them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderSpec:
    """A provider that can be started.

    ``start`` is decorated with ``contextlib.asynccontextmanager`` and yields an object of a subclass of ``api``. What
    its parameters are annotated with is what it is given: its ``config``, contracts, ``Database``, ``Blobs``
    and ``Folder``.
    """

    api: type[Api]
    name: str
    start: Start
    config: type[Config] = NoConfig
    description: str = ""

    def __post_init__(self) -> None:
        _check_api(self.api)
        _check_declared("provider", self.name, self.start, self.config)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSpec:
    """A new API: its contract, from which routes, client and documents are derived."""

    api: type[Api]

    def __post_init__(self) -> None:
        _check_api(self.api)
        _check_name("API", self.api.name)
        operations(self.api)  # raises TypeError for a signature that says no operation

    @property
    def name(self) -> str:
        return self.api.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """A tool that agents may be given, or several.

    ``start`` yields a ``Tool`` or a ``ToolSource`` and has needs as a provider's start has.
    """

    name: str
    start: Start
    config: type[Config] = NoConfig
    description: str = ""
    permissions: Mapping[Permission, Callable[[Any], Sequence[str]]] = field(default_factory=dict)
    """What the tool may ask for, and of which hosts, files or programs with a given config; with none it does not."""

    def __post_init__(self) -> None:
        _check_declared("tool", self.name, self.start, self.config)
        if not all(isinstance(each, Permission) and callable(of) for each, of in self.permissions.items()):
            raise TypeError(f"tool {self.name!r}: its permissions do not map a Permission to a function of a config")

    def asked(self, config: Config) -> dict[Permission, list[str]]:
        """The permissions that it asks for with a config, and of what. Raises what the plugin raises."""
        found = {permission: list(of(config)) for permission, of in self.permissions.items()}
        return {permission: what for permission, what in found.items() if what}


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceSpec:
    """Routes over contracts that exist. ``start`` yields a ``fastapi.APIRouter`` and has needs as a provider's has."""

    name: str
    start: Start
    config: type[Config] = NoConfig
    description: str = ""

    def __post_init__(self) -> None:
        _check_declared("face", self.name, self.start, self.config)


@dataclass(frozen=True, slots=True, kw_only=True)
class MiddlewareSpec:
    """Something around every request. ``wrap`` takes an ASGI application and the config, and returns another one."""

    name: str
    wrap: Callable[[Any, Any], Any]
    config: type[Config] = NoConfig
    description: str = ""

    def __post_init__(self) -> None:
        _check_name("middleware", self.name)
        _check_config("middleware", self.name, self.config)
        if not callable(self.wrap):
            raise TypeError(f"middleware {self.name!r}: wrap is not a function")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandSpec:
    """A command of ``llama-stack``, imported only when it is called."""

    name: str
    help: str
    target: str
    """``MODULE:ATTRIBUTE`` of a click command."""

    def __post_init__(self) -> None:
        _check_name("command", self.name)
        module, colon, attribute = self.target.partition(":")
        if not (module and colon and attribute):
            raise ValueError(f"command {self.name!r}: the target {self.target!r} is not MODULE:ATTRIBUTE")

    def load(self) -> Command:
        """The click command. Raises what importing its module raises."""
        module, _, attribute = self.target.partition(":")
        command: Command = getattr(importlib.import_module(module), attribute)
        return command


@hookspec
def llama_stack_providers(apis: Sequence[type[Api]]) -> Iterable[ProviderSpec]:
    """Declare the providers that this plugin can start.

    ``apis`` are the contracts known so far, for a plugin that provides any API; leave the parameter out where nothing
    depends on it. The hook is called again when a plugin that is imported later brings more contracts.

    Two packages that declare one API and name stop the start of a distribution that uses it, with
    ``DuplicateProviderError``, which names both.

    Example::

        @hookimpl
        def llama_stack_providers():
            yield ProviderSpec(api=Safety, name="keyword", config=KeywordConfig, start=start_keyword)
    """


@hookspec
def llama_stack_apis() -> Iterable[ApiSpec]:
    """Declare whole new APIs, which any plugin may then provide.

    Example::

        @hookimpl
        def llama_stack_apis():
            yield ApiSpec(api=Translation)
    """


@hookspec
def llama_stack_tools() -> Iterable[ToolSpec]:
    """Declare tools that agents may be given.

    Example::

        @hookimpl
        def llama_stack_tools():
            yield ToolSpec(name="dice", start=start_dice, description="Throws dice")
    """


@hookspec
def llama_stack_faces() -> Iterable[FaceSpec]:
    """Declare faces: other routes over contracts that exist.

    Example::

        @hookimpl
        def llama_stack_faces():
            yield FaceSpec(name="openai-api", start=start_openai_api)
    """


@hookspec
def llama_stack_commands() -> Iterable[CommandSpec]:
    """Declare commands of ``llama-stack``.

    Example::

        @hookimpl
        def llama_stack_commands():
            yield CommandSpec(name="embed", help="Embed a text.", target="llama_stack_embed.commands:embed")
    """


@hookspec
def llama_stack_middleware() -> Iterable[MiddlewareSpec]:
    """Declare middlewares, which a distribution may lay around every request.

    Example::

        @hookimpl
        def llama_stack_middleware():
            yield MiddlewareSpec(name="audit", wrap=audit, config=AuditConfig)
    """


def provides(name: str, provider: type[Api], *, config: type[Config] = NoConfig) -> Callable[[], list[ProviderSpec]]:
    """The hook of a plugin that is one class: what its ``__init__`` takes are its needs, by their annotations.

    Example, which makes the module that it stands in a plugin::

        llama_stack_providers = provides("keyword", KeywordShield, config=KeywordConfig)
    """

    async def start(**needed: Any) -> AsyncIterator[Api]:
        yield provider(**needed)

    make = provider.__init__
    parameters = [] if make is object.__init__ else list(inspect.signature(make).parameters.values())[1:]
    # What the stack reads of a start function: the parameters and types of the one that is called in the end.
    start.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    start.__annotations__ = {p.name: annotation_of(make, p.name) for p in parameters}
    start.__annotations__["return"] = AsyncIterator[provider]  # type: ignore[valid-type]
    description = (inspect.getdoc(provider) or "").partition("\n")[0]
    spec = ProviderSpec(
        api=contract_of(provider), name=name, start=asynccontextmanager(start), config=config, description=description
    )

    @hookimpl(specname="llama_stack_providers")
    def declared() -> list[ProviderSpec]:
        return [spec]

    return declared


Spec = ProviderSpec | ApiSpec | ToolSpec | FaceSpec | CommandSpec | MiddlewareSpec

_RECORDS: Mapping[str, type[Any]] = {
    "llama_stack_providers": ProviderSpec,
    "llama_stack_apis": ApiSpec,
    "llama_stack_tools": ToolSpec,
    "llama_stack_faces": FaceSpec,
    "llama_stack_commands": CommandSpec,
    "llama_stack_middleware": MiddlewareSpec,
}


@dataclass(frozen=True, eq=False)
class Plugin:
    """An installed plugin as package metadata describe it; nothing of it is imported yet."""

    names: tuple[str, ...]
    """The names of the entry points that lead to it."""
    package: str
    target: str
    """The module, or ``MODULE:ATTRIBUTE``, that implements the hooks."""
    entry: EntryPoint | None = field(default=None, repr=False)
    loaded: object = field(default=None, repr=False)
    """The module or object itself, where it was handed over in process."""
    file: Path | None = None
    """The file that is the whole plugin, where it lies in a folder of plugins."""

    @property
    def name(self) -> str:
        return self.names[0]

    @cached_property
    def version(self) -> str:
        """The version of the package; reading it parses the package's metadata."""
        return (self.entry.dist.version if self.entry and self.entry.dist else "") or ""

    @property
    def label(self) -> str:
        """``llama-stack-keyword 1.2``: the plugin's package to people."""
        return f"{self.package} {self.version}".strip()

    def fault(self, cause: str, remedy: str) -> PluginLoadError:
        """The error that says that this plugin cannot be used."""
        return PluginLoadError(self.name, self.package, self.version, cause, remedy)


def discover(extra: Sequence[object] = ()) -> list[Plugin]:
    """The plugins that are installed, by package metadata alone; ``extra`` are modules or objects in this process."""
    in_process = [
        Plugin((getattr(module, "__name__", type(module).__name__),), "this process", "", loaded=module)
        for module in extra
    ]
    by_module: dict[tuple[str, str], list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        package = entry.dist.name if entry.dist else "unknown package"
        by_module.setdefault((package, entry.value), []).append(entry)
    return in_process + [
        Plugin(tuple(entry.name for entry in entries), package, target, entries[0])
        for (package, target), entries in by_module.items()
    ]


def in_folder(folder: Path) -> list[Plugin]:
    """The plugins of one file in a folder: ``NAME.py``, unless the name begins with ``_``. Nothing is imported.

    Raises ``OSError`` for a folder that cannot be read.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix == ".py" and path.stem.isidentifier())
    return [
        Plugin(tuple(dict.fromkeys((file.stem.replace("_", "-"), file.stem))), str(file), file.stem, file=file)
        for file in files
        if not file.stem.startswith("_") and file.is_file()
    ]


def load(plugin: Plugin, apis: Sequence[type[Api]] = APIS) -> tuple[Spec, ...]:
    """Import a plugin and return what it declares, told that these are the contracts there are.

    Raises ``PluginLoadError`` for whatever is wrong with it, ``SystemExit`` at import included. Only an interrupt by
    the user passes.
    """
    if plugin.loaded is None and (written := _written_version(plugin)) is not None:
        _check_version(plugin, written)
    module = plugin.loaded or _imported(plugin)
    _check_version(plugin, getattr(module, _VERSION, ">=1.0,<2"))
    hooks = pluggy.PluginManager(GROUP)
    hooks.add_hookspecs(sys.modules[__name__])
    try:
        hooks.register(module)
        hooks.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        what = " ".join(str(error).split())  # pluggy gives the cause on its last line
        raise plugin.fault(what, f"implement the hooks as they are declared: {', '.join(_RECORDS)}") from error
    implemented = [hook for hook in _RECORDS if getattr(hooks.hook, hook).get_hookimpls()]
    declared: list[Spec] = []
    for hook in implemented:
        record = _RECORDS[hook]
        arguments = {"apis": tuple(apis)} if hook == "llama_stack_providers" else {}
        for spec in _called(plugin, hook, partial(getattr(hooks.hook, hook), **arguments)):
            if not isinstance(spec, record):
                what = f"the hook {hook} declares {type(spec).__name__!r} where {record.__name__} belongs"
                raise plugin.fault(what, f"yield {record.__name__} records from it")
            declared.append(spec)
    if not implemented:
        wrong = [name for name in dir(module) if name.startswith("llama_stack_") and callable(getattr(module, name))]
        hint = nearest(wrong[0], _RECORDS) if wrong else ""
        raise plugin.fault(
            "it implements none of the hooks" + hint, "decorate its hooks with llama_stack.plugins.hookimpl"
        )
    return tuple(declared)


def _imported(plugin: Plugin) -> object:
    reinstall = f"reinstall {plugin.package}, or deny it under 'plugins:'"
    if plugin.file is not None:
        reinstall = f"mend {plugin.file}, or take it out of its folder"
    try:
        return plugin.entry.load() if plugin.entry is not None else _imported_file(plugin.file)
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        own = plugin.target.partition(":")[0]
        if error.name and (own == error.name or own.startswith(error.name + ".")):
            raise plugin.fault(f"its module {error.name!r} does not exist", reinstall) from error
        what = f"it needs the module {error.name!r}, which is not installed"
        raise plugin.fault(what, f"install what {plugin.package} requires, or deny it under 'plugins:'") from error
    except SystemExit as error:
        raise plugin.fault("it ended the process when it was imported", reinstall) from error
    except BaseException as error:
        raise plugin.fault(f"importing it raised {_named(error)}", reinstall) from error


def _imported_file(file: Path | None) -> object:
    assert file is not None, "a plugin is an entry point, an object or a file"
    path = file.resolve()
    name = f"llama_stack_plugin_{sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    if name not in sys.modules:  # a module of its own, whatever else is called so; type hints are read through it
        spec = spec_from_file_location(name, path)
        assert spec is not None, "its name ends with .py"
        assert spec.loader is not None, "it is a file"
        sys.modules[name] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _written_version(plugin: Plugin) -> object:
    """The version that a plugin's source states, so that one made for another interface is not even imported.

    ``None`` where it states none, or not in so many words.
    """
    try:
        file = plugin.file or _source_of(plugin.target)
        tree = ast.parse(file.read_bytes()) if file is not None else None
    except (OSError, SyntaxError, ValueError, ImportError, RecursionError, MemoryError):
        return None  # importing it says what is wrong
    for node in tree.body if tree is not None else ():
        names = [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and _VERSION in names:
            return node.value.value
    return None


def _source_of(target: str) -> Path | None:
    """The file of a plugin's module, found without importing the packages that it lies in."""
    top, *rest = target.partition(":")[0].split(".")
    spec = find_spec(top)
    if spec is None or not rest:
        return Path(spec.origin) if spec is not None and spec.origin is not None else None
    for folder in spec.submodule_search_locations or ():
        base = Path(folder, *rest)
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None


def _check_version(plugin: Plugin, declared: object) -> None:
    """A plugin that names no range was written for the first version."""
    ours = ".".join(map(str, API_VERSION))
    clauses = [_CLAUSE.fullmatch(clause) for clause in declared.split(",")] if isinstance(declared, str) else [None]
    for clause in clauses:
        if clause is None:
            what = f"its llama_stack_api_version {declared!r} is not a range"
            raise plugin.fault(what, "write one such as '>=1.0,<2'")
        sign, major, minor = clause.groups()
        if not _COMPARE[sign](API_VERSION, (int(major), int(minor or 0))):
            what = f"it wants version {declared} of the plugin interface, and this is {ours}"
            raise plugin.fault(what, f"install a version of {plugin.package} that was made for {ours}")


def _called(plugin: Plugin, hook: str, call: Callable[[], Sequence[Iterable[Any]]]) -> list[Any]:
    try:
        return [spec for declared in call() for spec in declared]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        remedy = f"report it to the authors of {plugin.package}, or deny it under 'plugins:'"
        raise plugin.fault(f"the hook {hook} raised {_named(error)}", remedy) from error


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(error)}".removesuffix(": ")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def _check_declared(kind: str, name: str, start: Start, config: type[Config]) -> None:
    _check_name(kind, name)
    _check_config(kind, name, config)
    if not callable(start) or inspect.isasyncgenfunction(start) or inspect.iscoroutinefunction(start):
        raise TypeError(f"{kind} {name!r}: decorate its start function with contextlib.asynccontextmanager")


def _check_name(kind: str, name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{kind} {name!r}: a name has lowercase letters, digits, '-' and '_', and at most 63 of them")


def _check_config(kind: str, name: str, config: type[Config]) -> None:
    if not (isinstance(config, type) and issubclass(config, Config)):
        raise TypeError(f"{kind} {name!r}: its config is not a subclass of llama_stack.apis.Config")


def _check_api(api: type[Api]) -> None:
    if not (isinstance(api, type) and issubclass(api, Api) and hasattr(api, "tag")):
        raise TypeError(f"{api!r} is not a contract: a subclass of llama_stack.apis.Api with name=")

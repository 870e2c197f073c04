"""The packages that bring what a distribution names: those that are installed, and those that pip has to install."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import DuplicateProviderError, NotInstalledError, PluginError
from ..inner import inner_providers
from ..plugins import Plugin
from ..registry import CORE, Installed, Registry
from .models import Distribution, canonical_name


@dataclass(frozen=True)
class Packages:
    """What pip has to install for a distribution."""

    requirements: list[str]
    """All of them, as pip takes them: those that ``requires`` names, and what is installed of the others, pinned."""
    missing: list[str]
    """Those that are not installed."""
    unknown: list[PluginError]
    """What the distribution names, no installed plugin brings, and no package that is missing could bring."""


def packages_of(distribution: Distribution, registry: Registry) -> Packages:
    """The packages that a distribution needs, as far as the machine and its ``requires`` tell."""
    plugins, unknown = used_plugins(distribution, registry)
    named = {_package(requirement) for requirement in distribution.requires}
    pinned = [
        f"{plugin.package}=={plugin.version}"
        for plugin in plugins
        if plugin.entry is not None and _package(plugin.package) not in named
    ]
    missing = missing_packages(distribution)
    return Packages([*distribution.requires, *pinned], missing, [] if missing else unknown)


def missing_packages(distribution: Distribution) -> list[str]:
    """What ``requires`` names and is not installed; versions are left to pip."""
    return [requirement for requirement in distribution.requires if not is_installed(requirement)]


def is_installed(requirement: str) -> bool:
    """Whether the package that a requirement names is there, in any version."""
    try:
        importlib.metadata.distribution(_package(requirement))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False
    return True


def used_plugins(distribution: Distribution, registry: Registry) -> tuple[list[Plugin], list[PluginError]]:
    """The plugins that bring what a distribution names, in the order of the file, and what none brings."""
    found: dict[Plugin, None] = {}
    unknown: list[PluginError] = []
    for find in _looked_up(distribution, registry):
        try:
            found[find().plugin] = None
        except (NotInstalledError, DuplicateProviderError) as error:
            unknown.append(error)
    return [plugin for plugin in found if plugin is not CORE], unknown


def _looked_up(distribution: Distribution, registry: Registry) -> Iterator[Callable[[], Installed[Any]]]:
    for name, entries in distribution.providers.items():
        yield partial(registry.declared_api, name)
        for entry in entries:
            yield from _providers(registry, name, entry.provider, entry.config)
    yield from (partial(registry.tool, tool.tool) for tool in distribution.tools)
    yield from (partial(registry.face, face.face) for face in distribution.faces)
    yield from (partial(registry.middleware, layer.middleware) for layer in distribution.middleware)


def _providers(
    registry: Registry, api: str, provider: str, config: Mapping[str, Any]
) -> Iterator[Callable[[], Installed[Any]]]:
    """A provider, and those behind it, however deep."""
    yield lambda: registry.provider(registry.api(api), provider)
    try:
        read = registry.provider(registry.api(api), provider).spec.config.read(config)
    except (
        NotInstalledError,
        DuplicateProviderError,
        ValueError,
    ):  # the first is told of; a config is check's to judge
        return
    for inner in inner_providers(read):
        yield from _providers(registry, api, inner.provider, inner.config)


def _package(requirement: str) -> str:
    """The package that a requirement names."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return canonical_name(found.group()) if found else ""

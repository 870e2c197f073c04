"""A lock on a distribution: which packages its providers came from, what was in them, and what its text said.

It is a file beside the distribution's. Where one lies there, a start compares it with what it finds, so that neither an
upgrade nor an edit changes in silence what a stack runs. It holds no secret: the value of a key whose name says that it
is one counts as the fact that it is set.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import DistributionError
from ..plugins import Plugin
from ..registry import Registry
from . import nodes
from .faults import is_secret
from .models import Distribution
from .nodes import Node, Scalar, Sequence
from .packages import used_plugins
from .source import find_distribution, read_source, shipped_distributions

LOCK_VERSION = 1

Lock = dict[str, Any]
"""What the file holds, as JSON: ``version``, ``llama_stack``, ``plugins`` by package, ``config``."""


def lock_path(file: str | os.PathLike[str]) -> Path:
    """Where the lock of a distribution's file lies: ``stack.yaml.lock``."""
    return Path(f"{os.fspath(file)}.lock")


def make_lock(
    file: str | os.PathLike[str], distribution: Distribution, registry: Registry, environ: Mapping[str, str]
) -> Lock:
    """The lock of a distribution as it stands, with its plugins as they are installed."""
    source = read_source(file, environ)
    assert source.root is not None, "it has been checked"
    text = json.dumps(_resolved(source.root, ()), sort_keys=True, ensure_ascii=False)
    return {
        "version": LOCK_VERSION,
        "llama_stack": __version__,
        "plugins": _plugins(used_plugins(distribution, registry)[0]),
        "config": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}",
    }


def lock_digest(lock: Lock) -> str:
    """One word for a whole lock: two stacks that show it run the same."""
    return f"sha256:{hashlib.sha256(json.dumps(lock, sort_keys=True).encode()).hexdigest()}"


def verified_lock(name: str, distribution: Distribution, registry: Registry, environ: Mapping[str, str]) -> str | None:
    """The digest of the lock beside a distribution's file, or ``None`` where there is no lock.

    ``name`` is what the command line named. Raises ``DistributionError`` with each thing that is not as it was locked.
    """
    if name in shipped_distributions():
        return None
    file = find_distribution(name)
    path = lock_path(file)
    if not path.exists():
        return None
    try:
        locked = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(locked, dict) or locked.get("version") != LOCK_VERSION:
            raise ValueError(f"it is not of version {LOCK_VERSION}")
    except (OSError, ValueError) as error:
        raise DistributionError([f"{path}: the lock cannot be read: {error}; {_again(file)}"]) from error
    found = make_lock(file, distribution, registry, environ)
    differences = list(_differences(locked, found))
    if differences:
        raise DistributionError([f"{path}: {difference}; {_again(file)}" for difference in differences])
    return lock_digest(found)


def _differences(locked: Lock, found: Lock) -> Iterator[str]:
    if locked.get("llama_stack") != found["llama_stack"]:
        yield f"llama-stack was {locked.get('llama_stack')} and is {found['llama_stack']}"
    was, now = locked.get("plugins"), found["plugins"]
    was = was if isinstance(was, dict) else {}
    for package in sorted({*was, *now}):
        before, after = was.get(package), now.get(package)
        if before is None:
            yield f"{package} was not used, and is now"
        elif after is None:
            yield f"{package} was used, and is not any more"
        elif before != after:
            versions = (before.get("version"), after["version"]) if isinstance(before, dict) else ("", "")
            moved = f"was {versions[0]} and is {versions[1]}" if versions[0] != versions[1] else "has other contents"
            yield f"{package} {moved}"
    if locked.get("config") != found["config"]:
        yield "what the distribution says has changed, here, in what it extends or in a variable"


def _again(file: str | os.PathLike[str]) -> str:
    return f"put back what was there, or run 'llama-stack lock {file}' where the change is meant"


def _resolved(node: Node, path: tuple[str | int, ...]) -> Any:
    match node:
        case nodes.Mapping(entries=entries):
            return {key: _resolved(value, (*path, key)) for key, value in entries.items()}
        case Sequence(items=items):
            return [_resolved(item, (*path, index)) for index, item in enumerate(items)]
        case Scalar(value=str(text)):
            return "secret" if is_secret(path) and text else text
        case Scalar(value=value):
            return value
    return None


def _label(plugin: Plugin) -> str:
    """The package, or the name of the one file: where it lies may be another place on each machine."""
    return plugin.file.name if plugin.file is not None else plugin.package


def _plugins(plugins: Iterable[Plugin]) -> dict[str, dict[str, str]]:
    """Each package with its version and a hash of all its plugins that are used."""
    by_label: dict[str, list[Plugin]] = {}
    for plugin in plugins:
        by_label.setdefault(_label(plugin), []).append(plugin)
    found = {}
    for label, same in by_label.items():
        contents = sorted({_contents(plugin) for plugin in same})
        whole = contents[0] if len(contents) == 1 else hashlib.sha256("".join(contents).encode()).hexdigest()
        found[label] = {"version": same[0].version, "contents": f"sha256:{whole}"}
    return found


def _contents(plugin: Plugin) -> str:
    """A hash of every file of the plugin's own package, or of its one file; what Python compiled is left out."""
    if plugin.file is not None:
        return hashlib.sha256(plugin.file.read_bytes()).hexdigest()
    whole = hashlib.sha256()
    spec = find_spec(plugin.target.partition(":")[0].partition(".")[0])
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = [(folder, path) for folder in folders for path in folder.rglob("*") if path.is_file()]
    if not files and spec is not None and spec.origin is not None:
        files = [(Path(spec.origin).parent, Path(spec.origin))]
    for folder, path in sorted(files):
        if "__pycache__" not in path.parts:
            whole.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()

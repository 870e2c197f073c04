"""Distributions: the YAML files that name what a stack runs."""

from .check import check_distribution, load_distribution, needed_packages
from .faults import Fault
from .lock import lock_digest, lock_path, make_lock, verified_lock
from .models import (
    Distribution,
    FaceEntry,
    MiddlewareEntry,
    PluginFilter,
    ProviderEntry,
    ServerConfig,
    ServerLimits,
    StorageConfig,
)
from .packages import Packages
from .schema import json_schema
from .source import find_distribution, shipped_distributions

__all__ = [
    "Distribution",
    "FaceEntry",
    "Fault",
    "MiddlewareEntry",
    "Packages",
    "PluginFilter",
    "ProviderEntry",
    "ServerConfig",
    "ServerLimits",
    "StorageConfig",
    "check_distribution",
    "find_distribution",
    "json_schema",
    "load_distribution",
    "lock_digest",
    "lock_path",
    "make_lock",
    "needed_packages",
    "shipped_distributions",
    "verified_lock",
]

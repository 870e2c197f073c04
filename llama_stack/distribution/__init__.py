"""Distributions: the YAML files that name what a stack runs."""

from .check import check_distribution, load_distribution
from .faults import Fault
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
from .schema import json_schema
from .source import find_distribution, shipped_distributions

__all__ = [
    "Distribution",
    "FaceEntry",
    "Fault",
    "MiddlewareEntry",
    "PluginFilter",
    "ProviderEntry",
    "ServerConfig",
    "ServerLimits",
    "StorageConfig",
    "check_distribution",
    "find_distribution",
    "json_schema",
    "load_distribution",
    "shipped_distributions",
]

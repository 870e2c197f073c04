"""Distributions: the YAML files that name what a stack runs."""

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

__all__ = [
    "Distribution",
    "FaceEntry",
    "MiddlewareEntry",
    "PluginFilter",
    "ProviderEntry",
    "ServerConfig",
    "ServerLimits",
    "StorageConfig",
]

"""Agents: a model that thinks, calls tools, retrieves, and is held by shields."""

from .config import AgentsConfig, HistoryPolicy, Limits, Retrieval

__all__ = ["AgentsConfig", "HistoryPolicy", "Limits", "Retrieval"]

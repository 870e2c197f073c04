"""Data for training: datasets, rewards by rules and by a judge, synthetic data. ``plugin.py`` has the providers."""

from .config import DatasetsConfig, JudgeConfig, RulesConfig, SyntheticDataConfig

__all__ = ["DatasetsConfig", "JudgeConfig", "RulesConfig", "SyntheticDataConfig"]

"""Reward models that need no reward head: rules, and a language model as a judge."""

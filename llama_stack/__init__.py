"""Llama Stack: everything an application needs around a Llama model, in one server process."""

__version__ = "0.1.0"

"""Shields: Llama Guard, prompt injection, insecure code; and what it takes to write another one."""

from .shield import NoParams, Shield, ShieldProvider, ShieldSettings, started, text_of

__all__ = ["NoParams", "Shield", "ShieldProvider", "ShieldSettings", "started", "text_of"]

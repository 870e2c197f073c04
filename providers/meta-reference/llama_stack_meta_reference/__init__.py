"""Llama in torch, as Llama Stack providers."""

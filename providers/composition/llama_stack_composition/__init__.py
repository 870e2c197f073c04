"""Providers of any API that stand before others of it."""

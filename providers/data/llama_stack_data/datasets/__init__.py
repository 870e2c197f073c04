"""Datasets: their descriptions in the store, their rows wherever they lie."""

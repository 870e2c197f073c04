"""Synthetic data: sampled, scored, filtered, stored."""

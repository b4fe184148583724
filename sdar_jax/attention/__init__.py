"""Attention over two key ranges per query row."""

from sdar_jax.attention.api import Implementation, attention

__all__ = ["Implementation", "attention"]

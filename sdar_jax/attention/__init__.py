"""Attention over two key ranges a query row."""

from sdar_jax.attention.api import Implementation, attention

__all__ = ["Implementation", "attention"]

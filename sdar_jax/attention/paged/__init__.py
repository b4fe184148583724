"""Attention of short windows of queries over keys and values kept in pages: what decoding runs."""

from sdar_jax.attention.paged.api import PagedImplementation, paged_attention
from sdar_jax.attention.paged.pages import write_pages

__all__ = ["PagedImplementation", "paged_attention", "write_pages"]

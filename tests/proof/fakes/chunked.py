"""What is taken where a kernel is not trusted."""

from sdar_jax.attention.chunked import backward, forward, unsupported

__all__ = ["backward", "forward", "unsupported"]

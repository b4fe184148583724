"""The demo: a small model trained from scratch, converted to block diffusion, and compared with its origin."""

# First, as it silences what transformers says when it is imported.
import sdar_jax  # noqa: F401

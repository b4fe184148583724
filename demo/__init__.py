"""The demo: a small model trained from scratch, converted to block diffusion, and compared with its origin."""

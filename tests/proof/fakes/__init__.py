"""Kernels of attention made right and wrong on purpose, each a module as the real ones are."""

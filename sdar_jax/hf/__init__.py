"""Hugging Face directories in and out."""

from sdar_jax.hf.pretrained import load_pretrained, model_directory, save_pretrained

__all__ = ["load_pretrained", "model_directory", "save_pretrained"]

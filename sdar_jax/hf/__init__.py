"""Hugging Face directories in and out."""

from sdar_jax.hf.pretrained import load_pretrained, save_pretrained
from sdar_jax.hf.released import model_directory, read_model_config

__all__ = ["load_pretrained", "model_directory", "read_model_config", "save_pretrained"]

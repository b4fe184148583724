"""Block-diffusion language models in JAX: conversion training and decoding (SDAR, arXiv 2510.06303)."""

import os

# When it is imported, transformers would advise on stderr to install torch, which nothing here uses.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from sdar_jax.config import ModelConfig
from sdar_jax.conversion import to_diffusion
from sdar_jax.decoding import Completion, DecodingConfig, Engine, generate, infill
from sdar_jax.evaluation import nelbo
from sdar_jax.model import logits
from sdar_jax.objectives import block_diffusion_loss
from sdar_jax.pretrained import load_pretrained, save_pretrained

__all__ = [
    "Completion",
    "DecodingConfig",
    "Engine",
    "ModelConfig",
    "block_diffusion_loss",
    "generate",
    "infill",
    "load_pretrained",
    "logits",
    "nelbo",
    "save_pretrained",
    "to_diffusion",
]

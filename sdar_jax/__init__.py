"""Block-diffusion language models in JAX: conversion training and decoding (SDAR, arXiv 2510.06303)."""

import os
from typing import TYPE_CHECKING, Any

# When it is imported, transformers would advise on stderr to install torch, which nothing here uses.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from sdar_jax.config import ModelConfig
from sdar_jax.conversion import to_diffusion
from sdar_jax.decoding import Completion, DecodingConfig, Engine, generate
from sdar_jax.evaluation import nelbo
from sdar_jax.model import logits
from sdar_jax.objectives import block_diffusion_loss
from sdar_jax.pretrained import load_pretrained, save_pretrained

if TYPE_CHECKING:
    from sdar_jax.training import TrainConfig, train

__all__ = [
    "Completion",
    "DecodingConfig",
    "Engine",
    "ModelConfig",
    "TrainConfig",
    "block_diffusion_loss",
    "generate",
    "load_pretrained",
    "logits",
    "nelbo",
    "save_pretrained",
    "to_diffusion",
    "train",
]


def __getattr__(name: str) -> Any:
    """What only training needs takes a second to import, and is imported when it is used."""
    if name not in ("TrainConfig", "train"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sdar_jax import training

    return getattr(training, name)

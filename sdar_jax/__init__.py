"""Block-diffusion language models in JAX: conversion training and decoding (SDAR, arXiv 2510.06303)."""

import importlib
import importlib.metadata
import os
from typing import TYPE_CHECKING, Any

# When it is imported, transformers would advise on stderr to install torch, which nothing here uses.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if TYPE_CHECKING:
    from sdar_jax.data import load_tokenizer
    from sdar_jax.decoding import Completion, DecodingConfig, Engine, generate, infill
    from sdar_jax.evaluation import nelbo
    from sdar_jax.hf import load_pretrained, save_pretrained
    from sdar_jax.model import ModelConfig, logits
    from sdar_jax.model.conversion import to_diffusion
    from sdar_jax.training import TrainConfig, train
    from sdar_jax.weighted_loss import block_diffusion_loss

__all__ = [
    "Completion",
    "DecodingConfig",
    "Engine",
    "ModelConfig",
    "TrainConfig",
    "block_diffusion_loss",
    "generate",
    "infill",
    "load_pretrained",
    "load_tokenizer",
    "logits",
    "nelbo",
    "save_pretrained",
    "to_diffusion",
    "train",
]

# Where each public name is imported from when it is first used: importing JAX and transformers takes seconds, which
# `sdar-jax --help` does not.
_HOMES = {
    "Completion": "decoding",
    "DecodingConfig": "decoding",
    "Engine": "decoding",
    "ModelConfig": "model",
    "TrainConfig": "training",
    "block_diffusion_loss": "weighted_loss",
    "generate": "decoding",
    "infill": "decoding",
    "load_pretrained": "hf",
    "load_tokenizer": "data",
    "logits": "model",
    "nelbo": "evaluation",
    "save_pretrained": "hf",
    "to_diffusion": "model.conversion",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    """Returns a public name, a submodule, or `__version__`, on first use."""
    if name == "__version__":
        value = _version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        value = _submodule(name)
    globals()[name] = value
    return value


def _version() -> str:
    try:
        return importlib.metadata.version("sdar-jax")
    except importlib.metadata.PackageNotFoundError:  # A checkout that is not installed.
        return "0+unknown"


def _submodule(name: str) -> Any:
    path = f"{__name__}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})

"""The network: its shape, its weights and its forwards, and which axes of it a mesh splits."""

from sdar_jax.model.config import ModelConfig
from sdar_jax.model.layer import LayerPages
from sdar_jax.model.rolled import rolls
from sdar_jax.model.transformer import (
    Model,
    Remat,
    Stack,
    Windows,
    empty_pages,
    logits,
    pages_for,
    roll_layers,
    stack_layers,
    unstack_layers,
)

__all__ = [
    "LayerPages",
    "Model",
    "ModelConfig",
    "Remat",
    "Stack",
    "Windows",
    "empty_pages",
    "logits",
    "pages_for",
    "roll_layers",
    "rolls",
    "stack_layers",
    "unstack_layers",
]

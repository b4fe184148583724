"""Block-diffusion decoding."""

from sdar_jax.decoding.commit_rules import CommitRule, tokens_per_step
from sdar_jax.decoding.config import Completion, DecodingConfig
from sdar_jax.decoding.engine import Engine
from sdar_jax.decoding.events import Event
from sdar_jax.decoding.generate import generate
from sdar_jax.decoding.infill import infill

__all__ = [
    "CommitRule",
    "Completion",
    "DecodingConfig",
    "Engine",
    "Event",
    "generate",
    "infill",
    "tokens_per_step",
]

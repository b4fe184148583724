"""Block-diffusion decoding."""

from sdar_jax.decoding.config import Completion, DecodingConfig
from sdar_jax.decoding.engine import Engine
from sdar_jax.decoding.events import Event
from sdar_jax.decoding.generate import generate
from sdar_jax.decoding.infill import infill

__all__ = ["Completion", "DecodingConfig", "Engine", "Event", "generate", "infill"]

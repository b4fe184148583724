"""Rotary position embedding, with the scalings that released configs ask for."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sdar_jax.model.config import ModelConfig
from sdar_jax.model.rope_config import RopeConfig


def rotate(x: Float[Array, "B T H K"], cos: Array, sin: Array) -> Float[Array, "B T H K"]:
    """Applies rotary embedding to the two halves of the head dimension, as Hugging Face lays them out.

    Where the tables are for fewer dimensions, to the two halves of as many first ones; the rest stay as they are.
    """
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    cos = cos[:, :, None]
    sin = sin[:, :, None]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    if rest.shape[-1]:
        rotated.append(rest)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def rope_tables(
    config: ModelConfig, positions: Int[Array, "B T"], dtype: DTypeLike
) -> tuple[Array, Array]:
    """Computes cos and sin [B, T, rotary_dim / 2], float32 or wider, with the attention factor of YaRN folded in."""
    rotary_dim = config.rope.rotary_dim(config.head_dim)
    frequencies, factor = rope_frequencies(config.rope, rotary_dim, config.max_position_embeddings)
    angles = positions[..., None].astype(jnp.promote_types(dtype, jnp.float32)) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rope_frequencies(
    rope: RopeConfig, rotary_dim: int, max_positions: int
) -> tuple[np.ndarray, float]:
    """Computes inverse frequencies [rotary_dim / 2] and the factor on cos and sin, as transformers'
    modeling_rope_utils has them."""
    frequencies = 1.0 / rope.theta ** (np.arange(0, rotary_dim, 2) / rotary_dim)
    if rope.rope_type == "linear":
        return (frequencies / rope.factor).astype(np.float32), 1.0
    if rope.rope_type == "llama3":
        return _llama3_frequencies(rope, frequencies).astype(np.float32), 1.0
    if rope.rope_type == "yarn":
        return _yarn_frequencies(rope, frequencies, max_positions).astype(np.float32), _yarn_factor(
            rope
        )
    return frequencies.astype(np.float32), 1.0


def _llama3_frequencies(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Divides long wavelengths by the factor, keeps short ones, and blends linearly between."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * np.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0, 1)
    return frequencies * (keep + (1 - keep) / rope.factor)


def _yarn_frequencies(rope: RopeConfig, frequencies: np.ndarray, max_positions: int) -> np.ndarray:
    """Interpolates as YaRN (arXiv 2309.00071): below `beta_slow` turns fully, above `beta_fast` not, a ramp between."""
    length = rope.original_max_position_embeddings or max_positions
    count = len(frequencies)

    def dimension(turns: float) -> float:
        return count * np.log(length / (turns * 2 * np.pi)) / np.log(rope.theta)

    low = max(np.floor(dimension(rope.beta_fast)), 0)
    high = min(np.ceil(dimension(rope.beta_slow)), 2 * count - 1)
    ramp = np.clip((np.arange(count) - low) / ((high - low) or 0.001), 0, 1)
    return frequencies * (1 - ramp + ramp / rope.factor)


def _yarn_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * float(np.log(rope.factor)) + 1.0 if rope.factor > 1 else 1.0

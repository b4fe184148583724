"""The one door to attention: `attention(q, k, v, ranges)`, and the choice of who computes it."""

from collections.abc import Callable
from typing import Literal, get_args

from jaxtyping import Array, Float

from sdar_jax.attention import chunked, reference
from sdar_jax.errors import ConfigError
from sdar_jax.visibility import Ranges

Implementation = Literal["reference", "chunked"]
_IMPLEMENTATIONS: dict[str, Callable] = {"reference": reference.attention, "chunked": chunked.attention}

# Below this many scores a head, one dense product beats a loop over tiles, and its memory is nothing.
_DENSE_SCORES = 256 * 256


def attention(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B K G D"],
    v: Float[Array, "B K G D"],
    ranges: Ranges,
    *,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B Q H D"]:
    """softmax(q k^T scale) v over the keys that `ranges` lets each query see.

    Query head h reads key-value head h // (H / G). Scores and sums are float32 (float64 for float64 inputs). A query
    that sees nothing gives zero.

    Args:
        scale: factor on the scores; 1 / sqrt(D) if None.
        implementation: "reference" (dense), "chunked" (visited tiles only, O(Q + K) memory) or None: the best for
            this shape.

    Raises:
        ConfigError: unknown implementation, or head counts that do not divide.
    """
    if q.shape[2] % k.shape[2]:
        raise ConfigError(f"{q.shape[2]} query heads do not divide over {k.shape[2]} key-value heads; use a multiple")
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ConfigError(
            f"attention implementation {implementation!r} is unknown; use one of {get_args(Implementation)}"
        )
    if implementation is None:
        implementation = "reference" if q.shape[1] * k.shape[1] <= _DENSE_SCORES else "chunked"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _IMPLEMENTATIONS[implementation](q, k, v, ranges, scale=scale)

"""Low-rank matrices beside the weights of experts (LoRA, arXiv 2106.09685), of each expert its own.

y = W_e x + B_e (A_e x)        A [E, r, K], B [E, N, r]
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sdar_jax.experts import grouped

# What a rank is padded to, with zeros, where the kernels for Hopper multiply: the least width that they take.
_KERNEL_WIDTH = 128


class LowRank(NamedTuple):
    """A and B of a projection of E experts; their scale is in B."""

    a: Float[Array, "E r K"]
    b: Float[Array, "E N r"]


class ExpertAdapters(NamedTuple):
    """Low-rank matrices of the experts' projections; None where one has none."""

    gate: LowRank | None = None
    up: LowRank | None = None
    down: LowRank | None = None


def plus_low_rank(
    out: Float[Array, "M N"],
    x: Float[Array, "M K"],
    pair: LowRank | None,
    sizes: Int[Array, " E"],
    *,
    partly: bool,
) -> Float[Array, "M N"]:
    """Adds to what experts compute of x what their low-rank matrices do; rows are sorted by expert.

    Args:
        pair: None adds nothing.
        sizes, partly: as for `grouped_dot`.
    """
    if pair is None:
        return out
    a, b = pair.a.swapaxes(1, 2), pair.b.swapaxes(1, 2)
    missing = -a.shape[2] % _KERNEL_WIDTH
    full = jnp.pad(a, ((0, 0), (0, 0), (0, missing)))
    if grouped.choose(x, full) == "mosaic_gpu":
        a, b = full, jnp.pad(b, ((0, 0), (0, missing), (0, 0)))
    inner = grouped.grouped_dot(x, a, sizes, partly)
    return out + grouped.grouped_dot(inner, b, sizes, partly)

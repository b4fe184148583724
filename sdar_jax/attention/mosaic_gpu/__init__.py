"""Range attention for Hopper (H100, H200), as Pallas kernels for Mosaic GPU.

Three kernels: forward, dQ, dK/dV. Operands bfloat16 or float16, scores, softmax and sums float32. Each program visits
the tiles that its list names (layout.py): what no query sees is never loaded, what all see is never masked. Tile sizes
and their reasons are in tile_sizes.toml.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sdar_jax.attention.mosaic_gpu.forward import outputs
from sdar_jax.attention.mosaic_gpu.key_gradients import key_gradients
from sdar_jax.attention.mosaic_gpu.query_gradient import Residuals, query_gradient
from sdar_jax.attention.tile_sizes import TileSizes, head_dims, tile_sizes_for
from sdar_jax.devices.chips import not_hopper
from sdar_jax.errors import ConfigError
from sdar_jax.visibility import Ranges

__all__ = ["backward", "forward", "unsupported"]

_NAME = "mosaic_gpu"
_DTYPES = (jnp.bfloat16, jnp.float16)


def unsupported(q: Array, k: Array, v: Array) -> str | None:
    """Says why these inputs, or the GPU that is here, are not for these kernels; None if they are."""
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"types are {q.dtype}, {k.dtype} and {v.dtype}; cast all to bfloat16 or float16"
    sizes = head_dims(_NAME, "forward")
    if q.shape[-1] not in sizes or v.shape[-1] != q.shape[-1]:
        return f"head sizes are {q.shape[-1]} and {v.shape[-1]}; use one of {sizes} for both, or 'chunked'"
    if 0 in (*q.shape, *k.shape):
        return f"shapes {q.shape} and {k.shape} are empty; use 'chunked'"
    if reason := not_hopper():
        return f"{reason}; use 'chunked'"
    return None


def forward(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B K G D"],
    v: Float[Array, "B K G D"],
    ranges: Ranges,
    *,
    scale: float,
    interpret: bool = False,
    tile_sizes: TileSizes | None = None,
) -> tuple[Float[Array, "B Q H D"], Float[Array, "B Q H"]]:
    """Computes the output in q's dtype, and logsumexp in float32: 0 and +inf where a query sees nothing.

    Args:
        scale: factor on the scores, positive.
        interpret: on a CPU, with races looked for; needs the interpreter as the tests extend it.
        tile_sizes: instead of the table's.

    Raises:
        ConfigError: scale is not positive; tile sizes that the kernel does not have.
    """
    _check_scale(scale)
    return outputs(
        q,
        k,
        v,
        ranges,
        scale=scale,
        tile_sizes=tile_sizes or _tile_sizes("forward", q),
        interpret=interpret,
    )


def backward(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B K G D"],
    v: Float[Array, "B K G D"],
    ranges: Ranges,
    out: Float[Array, "B Q H D"],
    logsumexp: Float[Array, "B Q H"],
    d_out: Float[Array, "B Q H D"],
    *,
    scale: float,
    interpret: bool = False,
    tile_sizes: dict[str, TileSizes] | None = None,
) -> tuple[Float[Array, "B Q H D"], Float[Array, "B K G D"], Float[Array, "B K G D"]]:
    """Computes the gradients for q, k and v, in their dtypes; the same bits each time.

    Args:
        tile_sizes: those of "dq" and "dkv", instead of the table's.

    Raises:
        ConfigError: as `forward`.
    """
    _check_scale(scale)
    tile_sizes = tile_sizes or {kernel: _tile_sizes(kernel, q) for kernel in ("dq", "dkv")}
    operands = (q, k, v, ranges, Residuals.of(out, logsumexp, d_out), d_out)
    dq = query_gradient(*operands, scale=scale, tile_sizes=tile_sizes["dq"], interpret=interpret)
    return dq, *key_gradients(
        *operands, scale=scale, tile_sizes=tile_sizes["dkv"], interpret=interpret
    )


def _tile_sizes(kernel: str, q: Array) -> TileSizes:
    return tile_sizes_for(_NAME, kernel, q.shape[-1])


def _check_scale(scale: float) -> None:
    # The largest score of a row is found before scaling.
    if scale <= 0:
        raise ConfigError(
            f"scale is {scale}; the mosaic_gpu kernels need a positive one, or use 'chunked'"
        )

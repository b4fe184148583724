"""Range attention on TPUs (v5e, v5p, v6e): Pallas kernels that loop over a list of visited tiles.

    layout.py       arrays padded to tiles, heads first, batch merged into the sequence
    visit_list.py   which tiles are visited, as a flat list for scalar memory
    forward.py      output and logsumexp
    backward.py     dQ, and dK with dV

A tile is `query_tile` folded rows (query positions times the query heads that share a kv head) by `key_tile` keys. A
full tile has a body of its own, unrolled over sub-blocks of 128 keys and software-pipelined; a partial one loops over
the sub-blocks that some row sees, and masks them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sdar_jax.attention.mosaic_tpu import backward as _backward
from sdar_jax.attention.mosaic_tpu import forward as _forward
from sdar_jax.attention.mosaic_tpu.common import LOG2_E
from sdar_jax.attention.mosaic_tpu.layout import Layout
from sdar_jax.attention.mosaic_tpu.visit_list import MAX_TILES, visit_lists
from sdar_jax.attention.tile_sizes import TileSizes, head_dims, tile_sizes_for
from sdar_jax.visibility import Ranges

_NAME = "mosaic_tpu"
_DTYPES = (jnp.bfloat16, jnp.float32)


def unsupported(q: Array, k: Array, v: Array) -> str | None:
    """Says why these shapes and types cannot be taken, and what would do; None if they can."""
    dims = head_dims(_NAME, "forward")
    if q.shape[-1] not in dims or v.shape[-1] != q.shape[-1]:
        return f"head sizes {q.shape[-1]} and {v.shape[-1]} are not supported; use equal ones of {dims}"
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"types {q.dtype}, {k.dtype}, {v.dtype} are not supported; use bfloat16 or float32 for all three"
    layouts = [_layout(q, k, kernel) for kernel in ("forward", "dq", "dkv")]
    if any(
        layout.batch * max(layout.query_tiles, layout.key_tiles) > MAX_TILES for layout in layouts
    ):
        return f"batch {q.shape[0]} of {q.shape[1]} queries has more than {MAX_TILES} tiles; use a smaller batch"
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
    """Computes what `reference.forward` does, with float32 logsumexp.

    Args:
        interpret: run on a CPU.
        tile_sizes: query_tile in folded rows, key_tile, and stages, how many sub-blocks of scores are computed ahead.
    """
    tile_sizes = _tile_sizes(q, "forward", tile_sizes)
    layout = Layout.of(q, k, tile_sizes)
    clipped = layout.clip(ranges)
    out, logsumexp = _forward.forward(
        visit_lists(clipped, layout, by_key=False),
        layout.bounds(clipped),
        layout.to_queries(q),
        layout.to_keys(k),
        layout.to_keys_transposed(v),
        layout,
        scale=scale,
        ahead=tile_sizes.stages,
        interpret=interpret,
    )
    return layout.from_queries(out), layout.from_rows(logsumexp)


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
    tile_sizes: TileSizes | None = None,
) -> tuple[Float[Array, "B Q H D"], Float[Array, "B K G D"], Float[Array, "B K G D"]]:
    """Computes the gradients for q, k and v, from what `forward` returned and the output's gradient; the same bits
    every time."""
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
    inputs = (q, k, v, ranges, logsumexp * LOG2_E, delta, d_out)
    dq = _query_gradient(*inputs, _tile_sizes(q, "dq", tile_sizes), scale, interpret)
    return dq, *_key_gradients(*inputs, _tile_sizes(q, "dkv", tile_sizes), scale, interpret)


def _tile_sizes(q: Array, kernel: str, tile_sizes: TileSizes | None) -> TileSizes:
    return tile_sizes or tile_sizes_for(_NAME, kernel, q.shape[-1])


def _layout(q: Array, k: Array, kernel: str) -> Layout:
    return Layout.of(q, k, _tile_sizes(q, kernel, None))


def _rows(
    layout: Layout, q: Array, d_out: Array, logsumexp: Array, delta: Array
) -> tuple[Array, Array, Array, Array]:
    # Padding is what a row that sees nothing is.
    statistics = layout.to_rows(logsumexp, jnp.inf), layout.to_rows(delta, 0.0)
    return layout.to_queries(q), layout.to_queries(d_out), *statistics


def _query_gradient(
    q, k, v, ranges, logsumexp, delta, d_out, tile_sizes: TileSizes, scale: float, interpret: bool
):
    layout = Layout.of(q, k, tile_sizes)
    clipped = layout.clip(ranges)
    dq = _backward.query_gradient(
        visit_lists(clipped, layout, by_key=False),
        layout.bounds(clipped),
        *_rows(layout, q, d_out, logsumexp, delta),
        layout.to_keys(k),
        layout.to_keys_transposed(k),
        layout.to_keys(v),
        layout,
        scale=scale,
        ahead=tile_sizes.stages,
        interpret=interpret,
    )
    return layout.from_queries(dq)


def _key_gradients(
    q, k, v, ranges, logsumexp, delta, d_out, tile_sizes: TileSizes, scale: float, interpret: bool
):
    layout = Layout.of(q, k, tile_sizes)
    clipped = layout.clip(ranges)
    dk, dv = _backward.key_gradients(
        visit_lists(clipped, layout, by_key=True),
        layout.bounds(clipped),
        *_rows(layout, q, d_out, logsumexp, delta),
        layout.to_keys(k),
        layout.to_keys(v),
        layout,
        scale=scale,
        ahead=tile_sizes.stages,
        interpret=interpret,
    )
    return layout.from_keys(dk), layout.from_keys(dv)

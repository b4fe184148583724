"""The door to paged attention, and the choice of its implementation.

An implementation is a module with

    unsupported(q, k_pages, v_pages, page_table, visible) -> str | None      why it cannot take these shapes and types
    forward(q, k_pages, v_pages, page_table, visible, *, scale) -> out

Kernels also take `interpret=True`, which runs them on a CPU.
"""

from functools import partial
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sdar_jax.attention import api
from sdar_jax.attention.implementations import Choice, Implementations
from sdar_jax.attention.mesh import over_heads
from sdar_jax.errors import ConfigError

PagedImplementation = Literal["reference", "xla", "mosaic_gpu", "mosaic_tpu"]

OP = Implementations("paged attention", "sdar_jax.attention.paged", get_args(PagedImplementation))
# What `attention.api.override` names otherwise.
_OVERRIDES = {"chunked": "xla"}


def paged_attention(
    q: Float[Array, "N W H D"],
    k_pages: Float[Array, "P G page D"],
    v_pages: Float[Array, "P G page D"],
    page_table: Int[Array, "N M"],
    visible: Int[Array, "N W"],
    *,
    scale: float | None = None,
    implementation: PagedImplementation | None = None,
) -> Float[Array, "N W H D"]:
    """Computes softmax(q k^T scale) v, where query w of sequence n sees the first `visible[n, w]` of the sequence's
    keys.

    Key i of sequence n is `k_pages[page_table[n, i // page], :, i % page]`; the window's own keys have been written
    before (`write_pages`). A bidirectional block has one `visible` for all its queries, a block-causal window one
    per block. Query head h reads key-value head h // (H / G). Scores and sums are float32 (float64 for float64 inputs).

    A query that sees nothing gives zero. Pages past the longest `visible` of a row are not read: their entries may be
    anything, and so may the keys past it in its last page. A row's result depends on nothing but its own queries, keys
    and `visible`, bit for bit: not on its neighbours, its index or which pages it has.

    A query that sees a NaN key gives NaN, and no other does. Values are finite, as `write_pages` leaves them: kernels
    multiply those that a query does not see by zero, and 0 * NaN is NaN.

    Args:
        q: queries of the window, [N, W, H, D].
        k_pages: keys of all pages, [P, G, page, D].
        v_pages: values of all pages, [P, G, page, D].
        page_table: int32 [N, M], in [0, P) as far as pages are used.
        visible: int32 [N, W]; what is not in [0, M * page] counts as the nearest of these.
        scale: factor on the scores; 1 / sqrt(D) if None.
        implementation: "reference" (dense), "xla" (any backend), "mosaic_gpu" (Hopper), "mosaic_tpu", or None: the best
            for this backend and shape. `attention.api.override` is obeyed too ("chunked" there is "xla" here).

    Under a mesh (`sharding.activate_mesh`) each device computes its own key-value heads.

    Raises:
        ConfigError: shapes that do not fit; an implementation that is unknown, or cannot take these inputs.
    """
    _check_shapes(q, k_pages, v_pages, page_table, visible)
    visible = jnp.clip(visible, 0, page_table.shape[1] * k_pages.shape[2])
    inputs = (q, k_pages, v_pages, page_table, visible)
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    local = partial(_local, scale=factor, implementation=implementation)
    return over_heads(
        local, inputs, heads_at=(2, 1, 1, None, None), out_at=2, kv_heads=k_pages.shape[1]
    )


def _local(*inputs: Array, scale: float, implementation: PagedImplementation | None) -> Array:
    """Computes one device's part, by an implementation chosen for the shapes that it has."""
    forward = OP.function(choose(*inputs, implementation=implementation), "forward")
    return forward(*inputs, scale=scale)


def _check_shapes(
    q: Array, k_pages: Array, v_pages: Array, page_table: Array, visible: Array
) -> None:
    rows, window, heads, dim = q.shape
    if k_pages.shape != v_pages.shape or k_pages.shape[3] != dim:
        raise ConfigError(
            f"pages {k_pages.shape} and {v_pages.shape} do not fit queries {q.shape}; all have one head_dim, {dim} here"
        )
    if heads % k_pages.shape[1]:
        raise ConfigError(
            f"{heads} query heads do not divide over {k_pages.shape[1]} key-value heads; use a multiple"
        )
    if page_table.shape[0] != rows or visible.shape != (rows, window):
        raise ConfigError(
            f"page_table {page_table.shape} and visible {visible.shape} do not fit queries {q.shape}; "
            f"use ({rows}, pages) and ({rows}, {window})"
        )


def choose(*inputs: Array, implementation: PagedImplementation | None = None) -> Choice:
    """Chooses an implementation as `attention.api.choose` does, for the arrays that `paged_attention` takes."""
    override = api.overriding()
    if override is not None:
        name = override.implementation
        override = override._replace(implementation=_OVERRIDES.get(name, name))
    return OP.requested(implementation, override, *inputs) or OP.kernel(*inputs) or Choice("xla")


def no_kernel(*inputs: Array) -> str | None:
    """Says why no kernel of this platform takes these inputs; None if one does."""
    return OP.no_kernel(*inputs)

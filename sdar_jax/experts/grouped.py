"""`grouped_dot`: a matmul whose rows come in groups, each with weights of its own."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sdar_jax.arithmetic import ceil_div
from sdar_jax.attention.implementations import Implementations
from sdar_jax.devices.chips import platform

OP = Implementations("experts", "sdar_jax.experts", ("mosaic_gpu",))

# Rows multiplied at once where there is no grouped kernel: about as many as a group has, between these.
_FEWEST_ROWS, _MOST_ROWS = 8, 128


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_dot(
    x: Float[Array, "M K"],
    weights: Float[Array, "G K N"],
    sizes: Int[Array, " G"],
    partly_filled: bool = False,
) -> Float[Array, "M N"]:
    """Multiplies the rows of x, sorted by group, with the weights of their group.

    On TPU XLA's kernel for `jax.lax.ragged_dot`. Elsewhere XLA computes that operation for every row and every group,
    and holds as much: Hopper has kernels of our own (`mosaic_gpu.py`) for half precision, and on everything else a scan
    visits the tiles of rows that each group has.

    Args:
        x: [M, K].
        weights: [G, K, N].
        sizes: int32 [G], how many rows each group has; M in all.
        partly_filled: they may be fewer. The rows after the last group then give zero, and cost nothing.
    """
    kernels = _kernels(x, weights)
    if kernels is not None:
        return kernels.product(x, weights, sizes)
    tiled = partial(tiled_dot, skipping=partly_filled)
    ragged = _filled_dot if partly_filled else jax.lax.ragged_dot
    return jax.lax.platform_dependent(x, weights, sizes, tpu=ragged, default=tiled)


def _grouped_dot_fwd(x, weights, sizes, partly_filled):
    return grouped_dot(x, weights, sizes, partly_filled), (x, weights, sizes)


def _grouped_dot_bwd(partly_filled, residuals, d_out):
    x, weights, sizes = residuals
    kernels = _kernels(x, weights)
    if kernels is not None:
        d_x = kernels.product(d_out, weights, sizes, transposed=True)
        return d_x, kernels.weight_gradient(x, d_out, sizes), None
    tiled = partial(_tiled_dot_gradients, skipping=partly_filled)
    ragged = partial(_ragged_dot_gradients, _filled_dot if partly_filled else jax.lax.ragged_dot)
    d_x, d_weights = jax.lax.platform_dependent(x, weights, sizes, d_out, tpu=ragged, default=tiled)
    return d_x, d_weights, None


grouped_dot.defvjp(_grouped_dot_fwd, _grouped_dot_bwd)


def choose(x: Array, weights: Array) -> str:
    """Chooses what multiplies: "mosaic_gpu", "ragged_dot" (XLA's kernel on TPU), or "tiled", the scan."""
    if platform() == "tpu":
        return "ragged_dot"
    kernel = OP.kernel(x, weights)
    return "tiled" if kernel is None else kernel.implementation


def no_kernel(x: Array, weights: Array) -> str | None:
    """Says why no kernel of this platform takes these operands; None if one does."""
    return None if platform() == "tpu" else OP.no_kernel(x, weights)


def _kernels(x: Array, weights: Array) -> ModuleType | None:
    """Returns the kernels for Hopper, where they are chosen."""
    if platform() == "tpu" or (choice := OP.kernel(x, weights)) is None:
        return None
    return OP.module(choice)


def _filled_dot(x: Array, weights: Array, sizes: Array) -> Array:
    """Runs `ragged_dot` with zeros after the last group, of which XLA's kernel says nothing, forward or backward."""
    filled = jnp.arange(len(x))[:, None] < sizes.sum()
    return jnp.where(filled, jax.lax.ragged_dot(jnp.where(filled, x, 0), weights, sizes), 0)


def _ragged_dot_gradients(
    dot, x: Array, weights: Array, sizes: Array, d_out: Array
) -> tuple[Array, Array]:
    _, pull_back = jax.vjp(lambda x, weights: dot(x, weights, sizes), x, weights)
    return pull_back(d_out)


class _Visit(NamedTuple):
    """Says that rows [start, end) of the tile at row `tile` belong to `group`; none in visits that are not needed."""

    tile: Int[Array, " V"]
    group: Int[Array, " V"]
    start: Int[Array, " V"]
    end: Int[Array, " V"]


def tiled_dot(
    x: Float[Array, "M K"],
    weights: Float[Array, "G K N"],
    sizes: Int[Array, " G"],
    *,
    skipping: bool,
) -> Float[Array, "M N"]:
    """Computes `grouped_dot` by a scan; `skipping` visits without rows pays where most are."""
    size = _tile_size(len(x), len(sizes))
    tiles = _pad_to_tiles(x, size)

    def visit(out: Array, at: _Visit) -> Array:
        part = _slice(tiles, at.tile, size) @ weights[at.group]
        out_tile = jnp.where(_inside(at, size), part, _slice(out, at.tile, size))
        return jax.lax.dynamic_update_slice_in_dim(out, out_tile, at.tile, 0)

    out = jnp.zeros((len(tiles), weights.shape[-1]), x.dtype)
    out = _scan(visit, out, _visits(sizes, len(x), size), skipping)
    return out[: len(x)]


def _tiled_dot_gradients(
    x: Array, weights: Array, sizes: Array, d_out: Array, *, skipping: bool
) -> tuple[Array, Array]:
    d_weights = tiled_weight_gradient(x, d_out, sizes, skipping=skipping)
    d_x = tiled_dot(d_out, weights.swapaxes(1, 2), sizes, skipping=skipping)
    return d_x, d_weights.astype(weights.dtype)


def tiled_weight_gradient(
    x: Float[Array, "M K"], d_out: Float[Array, "M N"], sizes: Int[Array, " G"], *, skipping: bool
) -> Float[Array, "G K N"]:
    """Sums x_m^T d_m over the rows of each group, in float32 at least, by the same scan."""
    size = _tile_size(len(x), len(sizes))
    tiles = _pad_to_tiles(x, size)
    d_tiles = _pad_to_tiles(d_out, size)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def visit(total: Array, at: _Visit) -> Array:
        own = jnp.where(_inside(at, size), _slice(tiles, at.tile, size), 0)
        part = jnp.einsum(
            "mk,mn->kn", own, _slice(d_tiles, at.tile, size), preferred_element_type=wide
        )
        return total.at[at.group].add(part)

    total = jnp.zeros((len(sizes), x.shape[1], d_out.shape[1]), wide)
    return _scan(visit, total, _visits(sizes, len(x), size), skipping)


def _scan(
    visit: Callable[[Array, _Visit], Array], carry: Array, visits: _Visit, skipping: bool
) -> Array:
    """Does all visits, or with `skipping` those with rows: a branch for each, which pays where most may have none."""

    def step(carry: Array, at: _Visit) -> tuple[Array, None]:
        if skipping:
            return jax.lax.cond(at.end > at.start, visit, lambda carry, _: carry, carry, at), None
        return visit(carry, at), None

    carry, _ = jax.lax.scan(step, carry, visits)
    return carry


def _tile_size(rows: int, groups: int) -> int:
    even = 1 << max(rows // groups - 1, 0).bit_length()
    return min(rows, max(_FEWEST_ROWS, min(_MOST_ROWS, even)))


def _pad_to_tiles(x: Array, size: int) -> Array:
    return jnp.pad(x, [(0, -len(x) % size), (0, 0)])


def _visits(sizes: Int[Array, " G"], rows: int, size: int) -> _Visit:
    """Lists every tile of every group that has rows in it, and as many empty ones as the worst sizes would need."""
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first = starts // size
    counts = jnp.where(sizes > 0, (ends - 1) // size - first + 1, 0)
    before = jnp.cumsum(counts) - counts
    most = ceil_div(rows, size) + min(len(sizes), rows) - 1
    number = jnp.arange(most, dtype=jnp.int32)
    group = jnp.searchsorted(before + counts, number, side="right").astype(jnp.int32)
    group = jnp.minimum(group, len(sizes) - 1)
    needed = number < counts.sum()
    tile = jnp.where(needed, first[group] + number - before[group], 0)
    tile = (tile * size).astype(jnp.int32)

    def clip(edge: Array) -> Array:
        """Places an edge of the visit's group within its tile."""
        return jnp.where(needed, jnp.clip(edge[group] - tile, 0, size), 0).astype(jnp.int32)

    return _Visit(tile, group, clip(starts), clip(ends))


def _slice(x: Array, tile: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, tile, size, 0)


def _inside(at: _Visit, size: int) -> Array:
    row = jnp.arange(size)[:, None]
    return (row >= at.start) & (row < at.end)

"""Attention over a mesh: each device attends for its own rows, heads and positions.

Rows and key-value heads (with the query heads that read them) are independent of each other, so a device computes its
own and nothing travels. Positions are not. Where the context axis divides a device's key-value heads, positions are
exchanged for heads and back (all-to-all; Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509), and the work is even
whatever the mask. Else each device keeps its queries and gathers the keys and values of the row (as in Llama 3,
arXiv 2407.21783, section 3.3.2), whose gradients are scattered back: with few key-value heads they are small.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from sdar_jax.devices import sharding
from sdar_jax.visibility import Ranges

Attend = Callable[[Array, Array, Array, Ranges], Array]


def over_mesh(
    attend: Attend,
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B K G D"],
    v: Float[Array, "B K G D"],
    ranges: Ranges,
) -> Float[Array, "B Q H D"]:
    """Runs `attend(q, k, v, ranges)` over the mesh in force; axes that do not divide it compute copies of the same."""
    mesh = sharding.current_mesh()
    if mesh is None:
        return attend(q, k, v, ranges)
    batch = sharding.mesh_axes("batch", q.shape[0]) or None
    context = sharding.mesh_axes("length", math.gcd(q.shape[1], k.shape[1])) or None
    kv_heads = sharding.mesh_axes("kv_heads", k.shape[2]) or None
    heads_per_device = k.shape[2] // sharding.num_shards("kv_heads", k.shape[2])
    exchanged = heads_per_device % sharding.num_shards("length", q.shape[1]) == 0
    by_head = PartitionSpec(batch, context, kv_heads)
    # Whoever has all queries of a head needs all of their ranges.
    by_query = PartitionSpec(batch, None if exchanged else context)
    if context is not None:
        attend = partial(_exchanged if exchanged else _gathered, attend, context)
    on_mesh = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(by_head, by_head, by_head, by_query),
        out_specs=by_head,
        check_vma=False,
    )
    return on_mesh(q, k, v, ranges)


def over_heads[Out](
    compute: Callable[..., Out],
    operands: Sequence[Array],
    *,
    heads_at: Sequence[int | None],
    out_at: int | tuple[int, ...],
    kv_heads: int,
) -> Out:
    """Runs `compute(*operands)` over the mesh in force, each device for its own key-value heads.

    Args:
        heads_at: for each operand the axis that is key-value heads, or query heads grouped by them; None for one that
            all devices read.
        out_at: the same for the result, or for each of several.
        kv_heads: how many there are on all devices together.
    """
    mesh = sharding.current_mesh()
    if mesh is None:
        return compute(*operands)
    split = sharding.mesh_axes("kv_heads", kv_heads) or None

    def spec(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, split)

    on_mesh = jax.shard_map(
        compute,
        mesh=mesh,
        in_specs=tuple(map(spec, heads_at)),
        out_specs=spec(out_at) if isinstance(out_at, int) else tuple(map(spec, out_at)),
        check_vma=False,
    )
    return on_mesh(*operands)


def _exchanged(
    attend: Attend, context: tuple[str, ...], q: Array, k: Array, v: Array, ranges: Ranges
) -> Array:
    to_heads = partial(
        jax.lax.all_to_all, axis_name=context, split_axis=2, concat_axis=1, tiled=True
    )
    out = attend(to_heads(q), to_heads(k), to_heads(v), ranges)
    return jax.lax.all_to_all(out, context, split_axis=1, concat_axis=2, tiled=True)


def _gathered(
    attend: Attend, context: tuple[str, ...], q: Array, k: Array, v: Array, ranges: Ranges
) -> Array:
    all_positions = partial(jax.lax.all_gather, axis_name=context, axis=1, tiled=True)
    return attend(q, all_positions(k), all_positions(v), ranges)

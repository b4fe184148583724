"""Looking tokens up in an embedding table that may be split over a mesh, without gathering the table."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sdar_jax.devices.sharding import current_mesh, mesh_axes, num_shards


def embed(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """Looks up rows of `table`, in `dtype`; NaN for what is no id of it.

    On a mesh each device looks up, in its part of the table, the tokens of all devices that it shares rows with along
    `embed`, and sends each of these what is theirs: as much travels as one activation holds, whatever the vocabulary.
    """
    mesh = current_mesh()
    known = (tokens >= 0) & (tokens < table.shape[0])
    if mesh is None:
        rows = jnp.take(table, tokens, axis=0, mode="clip").astype(dtype)
        return jnp.where(known[..., None], rows, jnp.nan)
    batch = mesh_axes("batch", tokens.shape[0])
    length = mesh_axes("length", tokens.shape[1])
    vocab = mesh_axes("vocab", table.shape[0])
    width = mesh_axes("embed", table.shape[1])
    exchanged = width and set(width) <= set(batch)
    size = table.shape[0] // num_shards("vocab", table.shape[0])

    def look_up(table: Array, tokens: Array) -> Array:
        if exchanged:
            tokens = jax.lax.all_gather(tokens, width, axis=0, tiled=True)
        if vocab:
            tokens = tokens - jax.lax.axis_index(vocab) * size
        # Another part's tokens are out of range here; negative ones would count from the end.
        tokens = jnp.where(tokens < 0, size, tokens)
        rows = jnp.take(table, tokens, axis=0, mode="fill", fill_value=0).astype(dtype)
        if vocab:
            rows = jax.lax.psum(rows, vocab)
        if exchanged:
            return jax.lax.all_to_all(rows, width, split_axis=0, concat_axis=2, tiled=True)
        if width:
            return jax.lax.all_gather(rows, width, axis=2, tiled=True)
        return rows

    by_token = PartitionSpec(batch or None, length or None)
    by_vocab = PartitionSpec(vocab or None, width or None)
    on_mesh = jax.shard_map(
        look_up,
        mesh=mesh,
        in_specs=(by_vocab, by_token),
        out_specs=by_token,
        check_vma=False,
    )
    return jnp.where(known[..., None], on_mesh(table, tokens), jnp.nan)

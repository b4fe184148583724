"""The experts over a mesh: each device of the `expert` axis holds some, and computes the tokens that are routed there.

Where rows are split over that axis, tokens travel to the experts and back, in one of two ways, none of which drops any:

- With fewer experts for a token than devices, each pair is sent to the owner of its expert and sent back
  (`exchange`). k rows of a token travel each way, at most.
- Else every device reads all tokens of the axis, computes what its own experts add, and the sums are scattered. One row
  of a token goes to each other device, which is no more.

Where rows are replicated, as few of them are in decoding, the sums over each device's experts are added up.
Buffers have room for the worst routing; what is computed is what was routed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from sdar_jax.devices import sharding
from sdar_jax.experts.exchange import exchange
from sdar_jax.experts.low_rank import ExpertAdapters, LowRank
from sdar_jax.experts.mlp import NO_ADAPTERS, mlp, permute, rows_mlp


def expert_mlp(
    x: Float[Array, "B T D"],
    experts: Int[Array, "N k"],
    gates: Float[Array, "N k"],
    gate_up: Float[Array, "E D 2 F"],
    down: Float[Array, "E F D"],
    adapters: ExpertAdapters = NO_ADAPTERS,
) -> Float[Array, "B T D"]:
    """Computes sum_j g_j down_j(silu(gate_j(x)) * up_j(x)) over the experts of each of N = B * T tokens, on any
    mesh.

    `adapters` are low-rank matrices beside the weights, as in `mlp`.
    """
    mesh = sharding.current_mesh()
    if mesh is None:
        out = mlp(x.reshape(-1, x.shape[-1]), experts, gates, gate_up, down, adapters)
        return out.reshape(x.shape)
    rows = sharding.mesh_axes("batch", x.shape[0])
    length = sharding.mesh_axes("length", x.shape[1])
    owners = sharding.mesh_axes("expert", len(gate_up))
    width = sharding.mesh_axes("mlp", down.shape[1])
    by_token = PartitionSpec(rows or None, length or None)
    by_expert_up = PartitionSpec(owners or None, None, None, width or None)
    by_expert_down = PartitionSpec(owners or None, width or None)
    on_mesh = jax.shard_map(
        partial(_on_device, owners, width, set(owners) <= set(rows)),
        mesh=mesh,
        in_specs=(
            *(by_token, by_token, by_token, by_expert_up, by_expert_down),
            _adapter_specs(adapters, owners, width),
        ),
        out_specs=by_token,
        check_vma=False,
    )
    experts = experts.reshape(*x.shape[:2], -1)
    gates = gates.reshape(*x.shape[:2], -1)
    return on_mesh(x, experts, gates, gate_up, down, adapters)


def _adapter_specs(
    adapters: ExpertAdapters, owners: tuple[str, ...], width: tuple[str, ...]
) -> ExpertAdapters:
    """Says how low-rank matrices lie: with their experts, and split where these are over their width."""
    whole = PartitionSpec(owners or None)
    b_up = PartitionSpec(owners or None, width or None)
    a_down = PartitionSpec(owners or None, None, width or None)
    specs = (whole, b_up), (whole, b_up), (a_down, whole)
    return ExpertAdapters(
        *(
            None if pair is None else LowRank._make(places)
            for pair, places in zip(adapters, specs, strict=True)
        )
    )


def _on_device(
    owners: tuple[str, ...],
    width: tuple[str, ...],
    split: bool,
    x: Array,
    experts: Array,
    gates: Array,
    *weights: Any,
) -> Array:
    """Computes a device's rows x [b, t, D], with its experts and its part of their width."""
    parts: Any = [part.reshape(-1, part.shape[-1]) for part in (x, experts, gates)]
    if not owners:
        out = mlp(*parts, *weights)
    elif not split:
        out = jax.lax.psum(_own_share(owners, *parts, *weights), owners)
    elif experts.shape[-1] < jax.lax.axis_size(owners):
        out = _sent(owners, *parts, *weights)
    else:
        gathered = [jax.lax.all_gather(part, owners, tiled=True) for part in parts]
        out = jax.lax.psum_scatter(_own_share(owners, *gathered, *weights), owners, tiled=True)
    if width:
        out = jax.lax.psum(out, width)
    return out.reshape(x.shape)


def _own_share(
    owners: tuple[str, ...], x: Array, experts: Array, gates: Array, gate_up: Array, *rest: Any
) -> Array:
    """Computes what this device's experts add to these tokens."""
    first = jax.lax.axis_index(owners) * len(gate_up)
    return mlp(x, experts - first, gates, gate_up, *rest, partly=True)


def _sent(
    owners: tuple[str, ...], x: Array, experts: Array, gates: Array, gate_up: Array, *rest: Any
) -> Array:
    """Sends pairs to the owners of their experts, computes them there, and sends them back."""
    devices = jax.lax.axis_size(owners)
    held = len(gate_up)
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    inverse = jnp.argsort(order)
    # Pairs of each sender for each expert: [sender, owner, expert of that owner].
    counts = jax.lax.all_gather(jnp.bincount(flat, length=devices * held), owners)
    counts = counts.reshape(devices, devices, held)
    sent = counts.sum(axis=-1)
    rows = permute(jnp.repeat(x, experts.shape[-1], axis=0), order, inverse)
    arrived = exchange(rows, sent, owners, capacity=devices * len(rows))
    own = counts[:, jax.lax.axis_index(owners)]
    # They arrive by sender, and by expert within: what is after the last belongs to none.
    expert_of_group = jnp.tile(jnp.arange(held), devices)
    expert = jnp.repeat(expert_of_group, own.reshape(-1), total_repeat_length=len(arrived))
    expert = jnp.where(jnp.arange(len(arrived)) < own.sum(), expert, held)
    by_expert = jnp.argsort(expert, stable=True)
    back = jnp.argsort(by_expert)
    computed = rows_mlp(
        permute(arrived, by_expert, back), own.sum(axis=0), gate_up, *rest, partly=True
    )
    returned = exchange(permute(computed, back, by_expert), sent.T, owners, capacity=len(rows))
    by_pair = permute(returned, inverse, order).reshape(*experts.shape, -1)
    return jnp.einsum("nkd,nk->nd", by_pair, gates)

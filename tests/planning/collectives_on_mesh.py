"""Counts the collectives of a scan over 8 virtual devices, data 2 x tensor 4, and prints them as JSON."""

import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from sdar_jax.planning.count import count, group_list
from sdar_jax.planning.hlo import parse
from sdar_jax.planning.network import axes_of

mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def body(x, _):
    everyone = jax.lax.all_gather(x, "tensor", tiled=True)
    own = jax.lax.psum_scatter(jnp.sin(everyone), "tensor", tiled=True)
    own = jax.lax.psum(jnp.cos(own), "data")
    own = jax.lax.all_to_all(own, "tensor", 0, 0, tiled=True)
    return jax.lax.ppermute(own, "data", [(0, 1), (1, 0)]), None


def step(x):
    return jax.lax.scan(body, x, None, length=5)[0]


sharded = jax.shard_map(
    step,
    mesh=mesh,
    in_specs=PartitionSpec("tensor"),
    out_specs=PartitionSpec("tensor"),
    check_vma=False,
)
compiled = jax.jit(sharded).lower(jnp.zeros((64, 128), jnp.float32)).compile()
found = {}
for traffic, payload in count(parse(compiled.as_text())).payload.items():
    found[f"{traffic.kind} {axes_of(group_list(traffic.groups, 8)[0], mesh)}"] = payload
print(json.dumps(found))

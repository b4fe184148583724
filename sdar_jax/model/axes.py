"""The model's own table, over `devices.sharding`: which axes of its weights each axis of a mesh splits."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from sdar_jax.devices.sharding import (
    ACTIVATIONS,
    MESH_AXES,
    RULES,
    Rules,
    axis_size,
    carriers_of,
    check_divides,
    current_mesh,
    spec,
)
from sdar_jax.errors import ConfigError
from sdar_jax.model.adapted import ADAPTED_OUTPUT_AXES, EXPERT_OUTPUT_AXES
from sdar_jax.model.config import ModelConfig

# Logical axes of each weight as layer.py shapes it; None is never split, and shorter entries never split the last
# axes. Gradients, optimiser moments and moving averages carry the names of their weights, and lie as these do.
WEIGHTS = {
    "embedding": ("vocab", "embed"),
    "head": ("vocab", "embed"),
    "final_norm": (),
    "attention_norm": (),
    "qkv": ("kv_heads", None, None, "embed"),
    "qkv_bias": ("kv_heads",),
    "q_norm": (),
    "k_norm": (),
    "output": ("embed", "kv_heads"),
    "output_bias": (),
    "mlp_norm": (),
    "gate_up": (None, "mlp", "embed"),
    "gate_up_bias": (None, "mlp"),
    "down": ("embed", "mlp"),
    "down_bias": (),
    "shared_gate_up": (None, "mlp", "embed"),
    "shared_down": ("embed", "mlp"),
    "router": ("embed", None),
    "expert_bias": (),
    "experts_gate_up": ("expert", "embed", None, "mlp"),
    "experts_down": ("expert", "mlp", "embed"),
}


def check_mesh(
    mesh: Mesh | AbstractMesh,
    model: ModelConfig,
    *,
    batch_size: int | None = None,
    lengths: Sequence[int] = (),
) -> None:
    """Raises ConfigError, with the sizes that would do, where an axis of `mesh` does not divide what it splits.

    Args:
        batch_size: rows computed at once.
        lengths: numbers of positions per row that are computed: all of them, and the outputs.
    """
    check_rules(mesh)
    heads = model.num_kv_heads
    experts = model.num_experts
    widths = model.mlp_widths
    size = math.gcd(*widths.values())
    # What each axis has to divide, and why.
    totals = {
        "tensor": (
            math.gcd(heads, size),
            f"the model has {heads} key-value heads and "
            + ", ".join(f"{name} {width}" for name, width in widths.items()),
        ),
        "fsdp": (model.hidden_size, f"the model has hidden_size {model.hidden_size}"),
        "expert": (experts or 1, f"the model has {experts} experts"),
    }
    if lengths:
        listed = " and ".join(map(str, dict.fromkeys(lengths)))
        totals["context"] = (math.gcd(*lengths), f"rows are computed over {listed} positions")
    for axis, (total, reason) in totals.items():
        check_divides(f"mesh.{axis} is", axis_size(mesh, axis), total, reason)
    if batch_size is not None:
        batch_axes = carriers_of("batch", RULES)
        row_parts = math.prod(axis_size(mesh, axis) for axis in batch_axes)
        names = " * ".join(f"mesh.{axis}" for axis in batch_axes)
        check_divides(
            f"{names} is", row_parts, batch_size, f"{batch_size} rows are computed at once"
        )


def check_rules(mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> None:
    """Raises ConfigError unless mesh and rules name known Auto axes, and no array would use one twice."""
    carriers = [axis for name in rules for axis in carriers_of(name, rules)]
    for axis in (*mesh.axis_names, *carriers):
        if axis not in MESH_AXES:
            raise ConfigError(f"mesh axis {axis!r} is unknown; use axes out of {MESH_AXES}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ConfigError(
            f"mesh axes are {mesh.axis_types}; make the mesh with axis_types of AxisType.Auto"
        )
    unknown = set(rules) - set(RULES)
    if unknown:
        raise ConfigError(
            f"logical axes {sorted(unknown)} are unknown; rules may map {sorted(RULES)}"
        )
    for kind, table in (("weight", WEIGHTS), ("activation", ACTIVATIONS)):
        for name, axes in table.items():
            used = [carrier for axis in axes for carrier in carriers_of(axis, rules)]
            for axis in used:
                if used.count(axis) > 1:
                    raise ConfigError(
                        f"two axes of {kind} {name!r} map to mesh axis {axis!r}; give each one of its own"
                    )


def shardings[Tree](tree: Tree, mesh: Mesh, rules: Rules = RULES) -> Tree:
    """Makes a tree like `tree`, with a NamedSharding for each array.

    Args:
        tree: weights or their shapes, stacked or not: a `Model`, weights by name, or anything that holds such, as a
            training state does. What has no name of a weight, such as a count of steps, is replicated.
        mesh: with axes out of MESH_AXES, all of type Auto.
        rules: the mesh axes that carry each logical axis.

    Raises:
        ConfigError: a mesh or logical axis that is not known or not Auto, an array that would use one twice, or an
            array of several axes that is not in the table.
    """
    check_rules(mesh, rules)

    def place(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _weight_spec(path, leaf.shape, mesh, rules))

    return jax.tree.map_with_path(place, tree)


def constrain_weights[Tree](tree: Tree) -> Tree:
    """Constrains weights, or what has their names, to lie as `shardings` says on the mesh in force."""
    mesh = current_mesh()
    if mesh is None:
        return tree

    def place(path: tuple, leaf: Array) -> Array:
        return jax.lax.with_sharding_constraint(leaf, _weight_spec(path, leaf.shape, mesh, RULES))

    return jax.tree.map_with_path(place, tree)


def gathered[Tree](layer: Tree, dtype: DTypeLike) -> Tree:
    """Casts a layer's matrices to the dtype they are used in and gathers them along `embed` over the mesh in force.

    Cast first, where that is no wider: half as much travels. What splits them otherwise (heads, width, experts) still
    does.
    """
    mesh = current_mesh()
    if mesh is None:
        return layer
    rules = {name: carriers for name, carriers in RULES.items() if name != "embed"}

    def gather(path: tuple, weight: Array) -> Array:
        if "embed" not in _weight_axes(path, weight.ndim):
            return weight
        # Constrained twice, or the compiler may gather before it casts.
        for table in (RULES, rules):
            place = _weight_spec(path, weight.shape, mesh, table)
            narrow = weight if weight.dtype == jnp.int8 else weight.astype(dtype)
            weight = jax.lax.with_sharding_constraint(narrow, place)
        return weight

    return jax.tree.map_with_path(gather, layer)


def not_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Decides for jax.checkpoint what to save: everything the backward pass needs but gathered weights."""
    return primitive.name != "sharding_constraint"


def _weight_spec(
    path: tuple, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Rules
) -> PartitionSpec:
    return spec(mesh, _weight_axes(path, len(shape)), shape, rules)


def _low_rank_axes(field: str, *, of_inputs: bool) -> tuple[str | None, ...]:
    """Finds logical axes of A (`of_inputs`) or B beside a weight."""
    axes, outputs = WEIGHTS[field], ADAPTED_OUTPUT_AXES[field]
    if field in EXPERT_OUTPUT_AXES:
        expert, *rest = axes
        return (expert, None, *rest[:-outputs]) if of_inputs else (expert, *rest[-outputs:], None)
    return (None, *axes[outputs:]) if of_inputs else (*axes[:outputs], None)


def _weight_axes(path: tuple, rank: int) -> tuple[str | None, ...]:
    """Finds logical axes by the last name of a weight in the path; layers in a stack have one more."""
    names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    field = next((name for name in reversed(names) if name in WEIGHTS), None)
    if field is None and rank > 1:
        raise ConfigError(
            f"{'.'.join(names)} is not a known weight; add its logical axes to model.axes.WEIGHTS"
        )
    if field is None:
        return ()
    axes = WEIGHTS[field]
    # Low-rank matrices beside it: what they share with it lies as it does, ranks are not split.
    if {"lora_a", "lora_b"} & set(names):
        axes = _low_rank_axes(field, of_inputs="lora_a" in names)
    return (None, *axes) if {"first", "body"} & set(names) else axes

"""Where weights live on a mesh: one table of logical axes for every weight, one of the mesh axes that carry them."""

from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sdar_jax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")
RULES = {"vocab": "tensor", "embed": "fsdp", "kv_heads": "tensor", "mlp": "tensor"}

# Logical axes of each weight as model.py shapes it; None is never split. Shorter entries leave the last axes whole.
_WEIGHTS = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "final_norm": (),
    "attention_norm": (),
    "qkv": ("embed", "kv_heads"),
    "qkv_bias": ("kv_heads",),
    "q_norm": (),
    "k_norm": (),
    "output": ("kv_heads", None, None, "embed"),
    "output_bias": (),
    "mlp_norm": (),
    "gate_up": ("embed", None, "mlp"),
    "gate_up_bias": (None, "mlp"),
    "down": ("mlp", "embed"),
    "down_bias": (),
}


def shardings[Tree](model: Tree, mesh: Mesh, rules: Mapping[str, str] = RULES) -> Tree:
    """A tree like `model` (weights or their shapes, stacked or not) that holds a NamedSharding for each array.

    A logical axis is split over its mesh axis where the mesh has it and its size divides; else it stays whole.

    Args:
        mesh: with axes out of "data" (weights replicated), "fsdp" and "tensor", all of type Auto.
        rules: the mesh axis that carries each logical axis.

    Raises:
        ConfigError: a mesh or logical axis that is not known or not Auto, or a weight that would use one twice.
    """
    check_rules(mesh, rules)
    return jax.tree.map_with_path(lambda path, leaf: NamedSharding(mesh, _spec(path, leaf.shape, mesh, rules)), model)


def check_rules(mesh: Mesh, rules: Mapping[str, str] = RULES) -> None:
    """Raises ConfigError unless mesh and rules name known Auto axes, and no weight would use one twice."""
    for axis in (*mesh.axis_names, *rules.values()):
        if axis not in MESH_AXES:
            raise ConfigError(f"mesh axis {axis!r} is unknown; use axes out of {MESH_AXES}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ConfigError(f"mesh axes are {mesh.axis_types}; make the mesh with axis_types of AxisType.Auto")
    unknown = set(rules) - set(RULES)
    if unknown:
        raise ConfigError(f"logical axes {sorted(unknown)} are unknown; rules may map {sorted(RULES)}")
    for name, axes in _WEIGHTS.items():
        used = [rules[axis] for axis in axes if axis in rules]
        for axis in used:
            if used.count(axis) > 1:
                raise ConfigError(f"two axes of weight {name!r} map to mesh axis {axis!r}; give each one of its own")


def _spec(path: tuple, shape: tuple[int, ...], mesh: Mesh, rules: Mapping[str, str]) -> PartitionSpec:
    names = [str(getattr(key, "name", "")) for key in path]
    field = next(name for name in reversed(names) if name in _WEIGHTS)
    axes = ((None,) if "body" in names else ()) + _WEIGHTS[field]
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    carriers = [rules.get(axis) if axis else None for axis in axes]
    fits = [axis in sizes and size % sizes[axis] == 0 for axis, size in zip(carriers, shape, strict=False)]
    return PartitionSpec(*(axis if fit else None for axis, fit in zip(carriers, fits, strict=True)))

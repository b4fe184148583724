"""Meshes of devices, and what of the computation each axis of a mesh splits.

Every axis of every array has a logical name (`_WEIGHTS`, `_OTHERS`), and `RULES` says which mesh axes carry it:

    data     rows of the batch; weights are whole on each
    fsdp     rows of the batch; weights, gradients and optimiser state are split, and gathered layer by layer
    expert   rows of the batch; the experts of a mixture are split
    context  positions of a row
    tensor   heads, feed-forward width and vocabulary

The mesh in force is JAX's own, set by `use` around a jitted call. Where there is none, or it has one device, nothing
here adds anything to a computation.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from sdar_jax.config import ModelConfig
from sdar_jax.errors import ConfigError, is_int

# Outermost first: what talks most is innermost, where devices are nearest to each other.
MESH_AXES: tuple[str, ...] = ("data", "fsdp", "expert", "context", "tensor")

Rules = Mapping[str, str | tuple[str, ...]]
RULES: Rules = {
    "batch": ("data", "fsdp", "expert"),
    "length": "context",
    "vocab": "tensor",
    "embed": "fsdp",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
}

# Logical axes of each weight as model.py shapes it; None is never split. Shorter entries leave the last axes whole.
# Gradients, optimiser moments and moving averages carry the names of their weights, and lie as these do.
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
    "router": ("embed", None),
    "experts_gate_up": ("expert", "embed", None, "mlp"),
    "experts_down": ("expert", "mlp", "embed"),
}
# Activations and caches. Query heads are split with the key-value heads they read.
TOKENS = ("batch", "length")
HIDDEN = ("batch", "length", None)
HEADS = ("batch", "length", "kv_heads", None)
PAGES = (None, "kv_heads", None, None)
_OTHERS = {"tokens": TOKENS, "hidden": HIDDEN, "heads": HEADS, "pages": PAGES}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has; one of them may be -1: all that the others leave.

    By default every device is on `fsdp`.

    Raises:
        ConfigError: a size that is neither a positive integer nor -1, or more than one -1.
    """

    data: int = 1
    """Splits the rows of a batch, and nothing else: each has all weights."""
    fsdp: int = -1
    """Splits rows, weights and optimiser state; weights are gathered layer by layer. A divisor of hidden_size."""
    expert: int = 1
    """Splits rows, and the experts of a mixture. A divisor of their number."""
    context: int = 1
    """Splits the positions of each row, for rows too long for a device."""
    tensor: int = 1
    """Splits heads, feed-forward width and vocabulary. A divisor of num_kv_heads and of intermediate_size."""

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        for name, size in sizes.items():
            if not is_int(size) or (size < 1 and size != -1):
                raise ConfigError(f"{name} is {size!r}; give a positive integer, or -1 for all devices that are left")
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ConfigError(f"{' and '.join(free)} are -1; only one axis can take all devices that are left")

    def sizes(self, devices: int) -> dict[str, int]:
        """The size of each axis over so many devices. Raises ConfigError unless the product is that number."""
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        given = math.prod(size for size in sizes.values() if size > 0)
        told = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "a mesh of 1"
        free = next((name for name, size in sizes.items() if size == -1), None)
        if free is None and given != devices:
            raise ConfigError(f"{told} is {given} devices and there are {devices}; give sizes whose product is that")
        if devices % given:
            raise ConfigError(f"{told} does not divide {devices} devices; use {_listed(_divisors(devices))} in all")
        return sizes if free is None else {**sizes, free: devices // given}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with all of `MESH_AXES`, of type Auto, over `devices` (all of this job's if None).

    Neighbours on an inner axis are near each other where the platform tells.

    Raises:
        ConfigError: sizes that do not make up the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(config.sizes(len(devices)).values())
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


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
        lengths: of the parts of a row that are computed: the whole of it, and its outputs.
    """
    check_rules(mesh)
    heads, experts = model.num_kv_heads, model.num_experts
    width = "moe_intermediate_size" if experts else "intermediate_size"
    size = getattr(model, width)
    wholes = {
        "tensor": (math.gcd(heads, size), f"the model has {heads} key-value heads and {width} {size}"),
        "fsdp": (model.hidden_size, f"the model has hidden_size {model.hidden_size}"),
        "expert": (experts or 1, f"the model has {experts} experts"),
    }
    if lengths:
        told = " and ".join(map(str, dict.fromkeys(lengths)))
        wholes["context"] = math.gcd(*lengths), f"rows are computed over {told} positions"
    for axis, (whole, told) in wholes.items():
        _check_divides(f"mesh.{axis} is", _size(mesh, axis), whole, told)
    if batch_size is not None:
        rows = math.prod(_size(mesh, axis) for axis in _carriers("batch", RULES))
        axes = " * ".join(f"mesh.{axis}" for axis in _carriers("batch", RULES))
        _check_divides(f"{axes} is", rows, batch_size, f"{batch_size} rows are computed at once")


def _check_divides(what: str, size: int, whole: int, told: str) -> None:
    if whole % size:
        raise ConfigError(f"{what} {size} and {told}; use {_listed(_divisors(whole))}")


def check_rules(mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> None:
    """Raises ConfigError unless mesh and rules name known Auto axes, and no array would use one twice."""
    for axis in (*mesh.axis_names, *(axis for name in rules for axis in _carriers(name, rules))):
        if axis not in MESH_AXES:
            raise ConfigError(f"mesh axis {axis!r} is unknown; use axes out of {MESH_AXES}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ConfigError(f"mesh axes are {mesh.axis_types}; make the mesh with axis_types of AxisType.Auto")
    unknown = set(rules) - set(RULES)
    if unknown:
        raise ConfigError(f"logical axes {sorted(unknown)} are unknown; rules may map {sorted(RULES)}")
    for kind, table in (("weight", _WEIGHTS), ("activation", _OTHERS)):
        for name, axes in table.items():
            used = [carrier for axis in axes for carrier in _carriers(axis, rules)]
            for axis in used:
                if used.count(axis) > 1:
                    raise ConfigError(
                        f"two axes of {kind} {name!r} map to mesh axis {axis!r}; give each one of its own"
                    )


def spec(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int], rules: Rules = RULES
) -> PartitionSpec:
    """How an array of these logical axes and this shape lies on the mesh.

    A logical axis is split over the mesh axes that carry it, outermost first, as far as its size divides.
    """
    carried = [_dividing(mesh, _carriers(axis, rules), size) for axis, size in zip(axes, shape, strict=False)]
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in carried))


def named(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """`spec` by RULES, with its mesh."""
    return NamedSharding(mesh, spec(mesh, axes, shape))


def shardings[Tree](tree: Tree, mesh: Mesh, rules: Rules = RULES) -> Tree:
    """A tree like `tree`, with a NamedSharding for each array.

    Args:
        tree: weights or their shapes, stacked or not: a `Model`, weights by name, or anything that holds such, as a
            training state does. What has no name of a weight, such as a count of steps, is whole on every device.
        mesh: with axes out of MESH_AXES, all of type Auto.
        rules: the mesh axes that carry each logical axis.

    Raises:
        ConfigError: a mesh or logical axis that is not known or not Auto, an array that would use one twice, or an
            array of several axes that is not in the table.
    """
    check_rules(mesh, rules)
    place = lambda path, leaf: NamedSharding(mesh, _weight_spec(path, leaf.shape, mesh, rules))
    return jax.tree.map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How the rows of a batch [B, ...] lie on the mesh: over `batch`, each row whole."""
    return NamedSharding(
        mesh, PartitionSpec(tuple(axis for axis in _carriers("batch", RULES) if _size(mesh, axis) > 1))
    )


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays of a model lie on; None for a single device."""
    places = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    found = next((place.mesh for place in places if isinstance(place, NamedSharding)), None)
    return found if isinstance(found, Mesh) and found.size > 1 else None


@contextlib.contextmanager
def use(mesh: Mesh | None) -> Iterator[None]:
    """What is jitted and called inside is computed on `mesh`; None and meshes of one device change nothing."""
    if mesh is None or mesh.size == 1:
        yield
        return
    with jax.set_mesh(mesh):
        yield


def current_mesh() -> AbstractMesh | None:
    """The mesh in force while something is traced; None without one, and inside shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh


def constrain(x: Array, *axes: str | None) -> Array:
    """x, lying as its logical axes say on the mesh in force; shorter `axes` leave the last ones whole."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spec(mesh, axes, x.shape))


def constrain_weights[Tree](tree: Tree) -> Tree:
    """Weights, or what has their names, lying as `shardings` says on the mesh in force."""
    mesh = current_mesh()
    if mesh is None:
        return tree
    place = lambda path, leaf: jax.lax.with_sharding_constraint(leaf, _weight_spec(path, leaf.shape, mesh, RULES))
    return jax.tree.map_with_path(place, tree)


def gathered[Tree](layer: Tree, dtype: DTypeLike) -> Tree:
    """A layer's matrices in the type they are used in and whole along `embed`, gathered over the mesh in force.

    Cast first: half as much travels. What splits them otherwise (heads, width, experts) still does.
    """
    mesh = current_mesh()
    if mesh is None:
        return layer
    rules = {name: carriers for name, carriers in RULES.items() if name != "embed"}

    def gather(path: tuple, weight: Array) -> Array:
        if "embed" not in _weight_axes(path, weight.ndim):
            return weight
        # Said twice, or the compiler may gather before it casts.
        for table in (RULES, rules):
            place = _weight_spec(path, weight.shape, mesh, table)
            weight = jax.lax.with_sharding_constraint(weight.astype(dtype), place)
        return weight

    return jax.tree.map_with_path(gather, layer)


def not_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for jax.checkpoint: the backward pass keeps what it needs, but gathers weights once more."""
    return primitive.name != "sharding_constraint"


def carriers(axis: str, size: int) -> tuple[str, ...]:
    """The axes of the mesh in force that split a logical axis of this size; () without a mesh."""
    mesh = current_mesh()
    return () if mesh is None else _dividing(mesh, _carriers(axis, RULES), size)


def parts(axis: str, size: int) -> int:
    """Into how many parts the mesh in force splits a logical axis of this size; 1 without a mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in carriers(axis, size))


def _weight_spec(path: tuple, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Rules) -> PartitionSpec:
    return spec(mesh, _weight_axes(path, len(shape)), shape, rules)


def _weight_axes(path: tuple, rank: int) -> tuple[str | None, ...]:
    """Logical axes by the last name of a weight in the path; layers in a stack have one more."""
    names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    field = next((name for name in reversed(names) if name in _WEIGHTS), None)
    if field is None and rank > 1:
        raise ConfigError(f"{'.'.join(names)} is not a known weight; add its logical axes to sharding._WEIGHTS")
    if field is None:
        return ()
    return ((None,) if "body" in names else ()) + _WEIGHTS[field]


def _carriers(axis: str | None, rules: Rules) -> tuple[str, ...]:
    found = () if axis is None else rules.get(axis, ())
    return (found,) if isinstance(found, str) else found


def _dividing(mesh: Mesh | AbstractMesh, candidates: Sequence[str], size: int) -> tuple[str, ...]:
    """The first of the candidates whose product divides `size`; those of one device left out."""
    found, product = [], 1
    for axis in candidates:
        product *= _size(mesh, axis)
        if size % product:
            break
        if _size(mesh, axis) > 1:
            found.append(axis)
    return tuple(found)


def _size(mesh: Mesh | AbstractMesh, axis: str) -> int:
    return mesh.shape.get(axis, 1)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, min(number, 4096) + 1) if number % n == 0]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + (" or " if len(numbers) > 1 else "") + str(numbers[-1])

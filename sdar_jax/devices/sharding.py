"""Meshes of devices, and what of the computation each axis of a mesh splits.

Every axis of every array has a logical name (`ACTIVATIONS`, and a model's own table for its weights), and `RULES` says
which mesh axes carry it:

    data     rows of the batch; weights are replicated
    fsdp     rows of the batch; weights, gradients and optimiser state are split, and gathered layer by layer
    expert   rows of the batch; the experts of an MoE are split
    context  positions of a row
    tensor   heads, feed-forward width and vocabulary

The mesh in force is JAX's own, set by `activate_mesh` around a jitted call. Where there is none, or it has one device,
nothing here adds anything to a computation.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

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

# Activations and caches. Query heads are split with the key-value heads they read.
TOKENS = ("batch", "length")
HIDDEN_STATES = ("batch", "length", None)
HEADS = ("batch", "length", "kv_heads", None)
PAGES = (None, "kv_heads", None, None)
ACTIVATIONS = {"tokens": TOKENS, "hidden": HIDDEN_STATES, "heads": HEADS, "pages": PAGES}


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
    """Splits rows, and the experts of an MoE. A divisor of their number."""
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


def check_divides(what: str, size: int, whole: int, told: str) -> None:
    if whole % size:
        raise ConfigError(f"{what} {size} and {told}; use {_listed(_divisors(whole))}")


def spec(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int], rules: Rules = RULES
) -> PartitionSpec:
    """How an array of these logical axes and this shape lies on the mesh.

    A logical axis is split over the mesh axes that carry it, outermost first, as far as its size divides.
    """
    carried = [_dividing(mesh, carriers_of(axis, rules), size) for axis, size in zip(axes, shape, strict=False)]
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in carried))


def named(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """`spec` by RULES, with its mesh."""
    return NamedSharding(mesh, spec(mesh, axes, shape))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How the rows of a batch [B, ...] lie on the mesh: over `batch`, each row whole."""
    return NamedSharding(
        mesh, PartitionSpec(tuple(axis for axis in carriers_of("batch", RULES) if axis_size(mesh, axis) > 1))
    )


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays of a model lie on; None for a single device."""
    places = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    found = next((place.mesh for place in places if isinstance(place, NamedSharding)), None)
    return found if isinstance(found, Mesh) and found.size > 1 else None


@contextlib.contextmanager
def activate_mesh(mesh: Mesh | None) -> Iterator[None]:
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


def mesh_axes(axis: str, size: int) -> tuple[str, ...]:
    """The axes of the mesh in force that split a logical axis of this size; () without a mesh."""
    mesh = current_mesh()
    return () if mesh is None else _dividing(mesh, carriers_of(axis, RULES), size)


def num_shards(axis: str, size: int) -> int:
    """Into how many parts the mesh in force splits a logical axis of this size; 1 without a mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in mesh_axes(axis, size))


def carriers_of(axis: str | None, rules: Rules) -> tuple[str, ...]:
    found = () if axis is None else rules.get(axis, ())
    return (found,) if isinstance(found, str) else found


def _dividing(mesh: Mesh | AbstractMesh, candidates: Sequence[str], size: int) -> tuple[str, ...]:
    """The first of the candidates whose product divides `size`; those of one device left out."""
    found, product = [], 1
    for axis in candidates:
        product *= axis_size(mesh, axis)
        if size % product:
            break
        if axis_size(mesh, axis) > 1:
            found.append(axis)
    return tuple(found)


def axis_size(mesh: Mesh | AbstractMesh, axis: str) -> int:
    return mesh.shape.get(axis, 1)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, min(number, 4096) + 1) if number % n == 0]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + (" or " if len(numbers) > 1 else "") + str(numbers[-1])

"""Meshes of devices, and how each axis of a mesh splits the computation.

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
    """The number of devices on each axis of the mesh; one of them may be -1: all that the others leave.

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
                raise ConfigError(
                    f"{name} is {size!r}; give a positive integer, or -1 for all devices that are left"
                )
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ConfigError(
                f"{' and '.join(free)} are -1; only one axis can take all devices that are left"
            )

    def sizes(self, devices: int) -> dict[str, int]:
        """Computes the size of each axis over so many devices. Raises ConfigError unless their product is that
        number."""
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        given = math.prod(size for size in sizes.values() if size > 0)
        shown = (
            " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
            or "a mesh of 1"
        )
        free = next((name for name, size in sizes.items() if size == -1), None)
        if free is None and given != devices:
            raise ConfigError(
                f"{shown} is {given} devices and there are {devices}; give sizes whose product is that"
            )
        if devices % given:
            raise ConfigError(
                f"{shown} does not divide {devices} devices; use {_listed(_divisors(devices))} in all"
            )
        return sizes if free is None else {**sizes, free: devices // given}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh with all of `MESH_AXES`, of type Auto, over `devices` (all of this job's if None).

    Neighbours on an inner axis are near each other where the platform tells.

    Raises:
        ConfigError: sizes that do not make up the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(config.sizes(len(devices)).values())
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def tensor_mesh(tensor: int) -> Mesh | None:
    """Makes a mesh that splits heads, feed-forward width and vocabulary over the first so many devices, or all for -1.

    Returns None for one: the model is then on the first device, on no mesh.

    Raises:
        ConfigError: another number, or more than there are.
    """
    devices = jax.devices()
    if not is_int(tensor) or not (tensor == -1 or 1 <= tensor <= len(devices)):
        raise ConfigError(
            f"tensor is {tensor!r} and there are {len(devices)} devices; give 1 to {len(devices)}, or -1 for all"
        )
    if tensor == 1:
        return None
    return make_mesh(MeshConfig(fsdp=1, tensor=-1), devices if tensor == -1 else devices[:tensor])


def check_divides(what: str, size: int, total: int, reason: str) -> None:
    """Raises ConfigError, with the sizes that would do, unless `size` divides `total`."""
    if total % size:
        raise ConfigError(f"{what} {size} and {reason}; use {_listed(_divisors(total))}")


def spec(
    mesh: Mesh | AbstractMesh,
    axes: Sequence[str | None],
    shape: Sequence[int],
    rules: Rules = RULES,
) -> PartitionSpec:
    """Places an array of these logical axes and this shape on the mesh.

    A logical axis is split over the mesh axes that carry it, outermost first, as far as its size divides.
    """
    parts = []
    for axis, size in zip(axes, shape, strict=False):
        names = _dividing(mesh, carriers_of(axis, rules), size)
        parts.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*parts)


def named(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Makes a NamedSharding of `spec` by RULES."""
    return NamedSharding(mesh, spec(mesh, axes, shape))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the rows of a batch [B, ...] over the mesh; no row is split."""
    axes = tuple(axis for axis in carriers_of("batch", RULES) if axis_size(mesh, axis) > 1)
    return NamedSharding(mesh, PartitionSpec(axes))


def mesh_of(tree: Any) -> Mesh | None:
    """Finds the mesh that the arrays of a tree lie on; None for a single device.

    Of a model that is decoded in milliseconds, ask its embedding: walking all of it takes as long.
    """
    places = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    found = next((place.mesh for place in places if isinstance(place, NamedSharding)), None)
    return found if isinstance(found, Mesh) and found.size > 1 else None


@contextlib.contextmanager
def activate_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Computes what is jitted and called inside on `mesh`; None and meshes of one device change nothing."""
    if mesh is None or mesh.size == 1:
        yield
        return
    with jax.set_mesh(mesh):
        yield


def current_mesh() -> AbstractMesh | None:
    """Returns the mesh in force while something is traced; None without one, and inside shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh


def constrain(x: Array, *axes: str | None) -> Array:
    """Constrains x to lie as its logical axes say on the mesh in force; shorter `axes` leave the last ones unsplit."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, axes, x.shape))


def mesh_axes(axis: str, size: int) -> tuple[str, ...]:
    """Lists the axes of the mesh in force that split a logical axis of this size; () without a mesh."""
    mesh = current_mesh()
    if mesh is None:
        return ()
    return _dividing(mesh, carriers_of(axis, RULES), size)


def num_shards(axis: str, size: int) -> int:
    """Counts the parts that the mesh in force splits a logical axis of this size into; 1 without a mesh."""
    mesh = current_mesh()
    if mesh is None:
        return 1
    return math.prod(mesh.shape[name] for name in mesh_axes(axis, size))


def carriers_of(axis: str | None, rules: Rules) -> tuple[str, ...]:
    """Lists the mesh axes that may split a logical axis."""
    found = () if axis is None else rules.get(axis, ())
    return (found,) if isinstance(found, str) else found


def _dividing(mesh: Mesh | AbstractMesh, candidates: Sequence[str], size: int) -> tuple[str, ...]:
    """Takes the first candidates whose product divides `size`; those of one device are left out."""
    found = []
    product = 1
    for axis in candidates:
        product *= axis_size(mesh, axis)
        if size % product:
            break
        if axis_size(mesh, axis) > 1:
            found.append(axis)
    return tuple(found)


def axis_size(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Returns the size of a mesh axis; 1 where the mesh has none of this name."""
    return mesh.shape.get(axis, 1)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, min(number, 4096) + 1) if number % n == 0]


def _listed(numbers: Sequence[int]) -> str:
    return (
        ", ".join(map(str, numbers[:-1])) + (" or " if len(numbers) > 1 else "") + str(numbers[-1])
    )

"""Estimates the least seconds that a collective takes, on the links between the devices of a group.

Ring algorithms, at the links' full rate: an all-gather or reduce-scatter of B bytes over n devices sends B (n - 1) / n
from each, an all-reduce twice that. On a TPU's torus a group uses every axis that it spans, both ways where the axis is
a closed ring; an all-to-all is bound by the cut through the longest axis. GPUs use NVLink within a host and, where a
group spans hosts, every member's own network card at the same time.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from sdar_jax.devices.chips import Chip
from sdar_jax.planning.count import Traffic, group_list

_ROUNDS = {"all-reduce": 2.0}
_TO_ALL = ("all-to-all", "ragged-all-to-all")


class Link(NamedTuple):
    """A kind of collective along mesh axes, in a step.

    Attributes:
        kind: of collective.
        axes: names of mesh axes.
        payload: as in `Counts`.
        sent: bytes that leave a device.
        seconds: in all.
    """

    kind: str
    axes: str
    payload: float
    sent: float
    seconds: float


def links(payload: dict[Traffic, float], mesh: Mesh, chip: Chip) -> list[Link]:
    """Lists every kind of collective along every set of mesh axes, the slowest first.

    Args:
        payload: as `Counts` has it.
    """
    found: dict[tuple[str, str], np.ndarray] = {}
    devices = list(mesh.devices.flat)
    for traffic, size in payload.items():
        groups = group_list(traffic.groups, len(devices))
        sent = size * _ROUNDS.get(traffic.kind, 1.0) * _share(traffic.kind, groups.shape[1])
        key = traffic.kind, axes_of(groups[0], mesh)
        found[key] = found.get(key, np.zeros(3)) + [
            size,
            sent,
            seconds(traffic, size, devices, chip),
        ]
    rows = [Link(*key, *sums.tolist()) for key, sums in found.items() if sums[1] > 0]
    return sorted(rows, key=lambda link: -link.seconds)


def seconds(traffic: Traffic, payload: float, devices: list[Any], chip: Chip) -> float:
    """Estimates the seconds of the slowest of a collective's groups."""
    groups = group_list(traffic.groups, len(devices))
    if groups.shape[1] == 1:
        return 0.0
    seconds_of = _tpu_seconds if chip.platform == "tpu" else _gpu_seconds
    different = {}
    for group in groups:
        members = [devices[i] for i in group]
        different[_signature(members)] = members
    return max(
        seconds_of(traffic.kind, payload, members, devices, chip) for members in different.values()
    )


def _share(kind: str, size: int) -> float:
    return 1.0 if kind == "collective-permute" else (size - 1) / size


def axes_of(group: np.ndarray, mesh: Mesh) -> str:
    """Names the mesh axes along which a group's members differ: "fsdp", or "fsdp x tensor"."""
    at = np.array(np.unravel_index(group, mesh.devices.shape))
    varying = [
        name
        for name, places in zip(mesh.axis_names, at, strict=True)
        if len(set(places.tolist())) > 1
    ]
    return " x ".join(varying)


def along(axes: str, mesh: Mesh) -> str:
    """Writes the groups along such axes as a program for this mesh would."""
    sizes = ",".join(f"'{name}'={size}" for name, size in mesh.shape.items())
    named = ",".join(f"'{name}'" for name in axes.split(" x "))
    return f"mesh[{sizes}] {{{named}}}"


def _signature(group: list[Any]) -> tuple:
    """Makes a key that is equal for groups that are placed alike, so that only one of them is priced."""
    first = group[0]
    if hasattr(first, "coords"):
        return tuple(tuple(np.subtract(device.coords, first.coords).tolist()) for device in group)
    return tuple(device.process_index - first.process_index for device in group)


def _gpu_seconds(
    kind: str, payload: float, group: list[Any], devices: list[Any], chip: Chip
) -> float:
    size = len(group)
    hosts = {device.process_index for device in group}
    near = math.ceil(size / len(hosts))
    rounds = _ROUNDS.get(kind, 1.0)
    if kind == "collective-permute":
        return payload / (chip.link if len(hosts) == 1 else chip.between)
    within = rounds * payload * (near - 1) / near / chip.link
    if kind in _TO_ALL:
        return max(within, payload * (size - near) / size / chip.between)
    return max(within, rounds * payload * (len(hosts) - 1) / len(hosts) / (near * chip.between))


def _tpu_seconds(
    kind: str, payload: float, group: list[Any], devices: list[Any], chip: Chip
) -> float:
    spans = np.array([device.coords for device in group])
    torus = np.array([device.coords for device in devices]).max(axis=0) + 1
    extents = spans.max(axis=0) - spans.min(axis=0) + 1
    used = []
    for extent, full in zip(extents.tolist(), torus.tolist(), strict=True):
        is_ring = extent == full and full % chip.ring == 0
        if extent > 1:
            used.append((extent, 2 if is_ring else 1))
    if not used:
        return 0.0
    # Groups that lie in each other's gaps share the links.
    rate = chip.link * min(1.0, len(group) / math.prod(extent for extent, _ in used))
    if kind == "collective-permute":
        return payload / rate
    if kind in _TO_ALL:
        return payload * max(extent / (4 * way) for extent, way in used) / rate
    sent = _ROUNDS.get(kind, 1.0) * payload * _share(kind, len(group))
    return sent / (rate * sum(way for _, way in used))

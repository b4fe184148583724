"""The least seconds of collectives, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from sdar_jax.devices.chips import CHIPS
from sdar_jax.planning.count import Traffic
from sdar_jax.planning.network import seconds

GB = 1e9


def hosts(*sizes: int) -> list:
    return [
        SimpleNamespace(process_index=host) for host, size in enumerate(sizes) for _ in range(size)
    ]


def torus(*shape: int) -> list:
    return [SimpleNamespace(coords=coords) for coords in np.ndindex(*shape)]


@pytest.mark.parametrize(
    ("kind", "devices", "expected"),
    [
        ("all-gather", hosts(8), 7 / 8 / 450),
        ("reduce-scatter", hosts(8), 7 / 8 / 450),
        ("all-reduce", hosts(8), 2 * 7 / 8 / 450),
        ("all-to-all", hosts(8), 7 / 8 / 450),
        # Each host lacks three quarters, which its network cards fetch together; all of it passes each GPU's NVLink.
        ("all-gather", hosts(2, 2, 2, 2), 3 / 4 / (2 * 50)),
        ("all-gather", hosts(8, 8, 8, 8), 7 / 8 / 450),
        # Each device sends three quarters of its own to other hosts.
        ("all-to-all", hosts(8, 8, 8, 8), 3 / 4 / 50),
        ("collective-permute", hosts(1, 1), 1 / 50),
    ],
)
def test_gpus(kind, devices, expected):
    group = "{{" + ",".join(map(str, range(len(devices)))) + "}}"
    assert seconds(Traffic(kind, group), GB, devices, CHIPS["h200"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        # Closed rings carry both ways, on each axis.
        ("all-gather", (4, 4, 4), 63 / 64 / (6 * 90)),
        ("all-reduce", (4, 4, 4), 2 * 63 / 64 / (6 * 90)),
        # Two in a row have one link.
        ("all-gather", (2, 1, 1), 1 / 2 / 90),
        ("all-gather", (2, 2, 4), 15 / 16 / (4 * 90)),
        # Half of the bytes cross the middle of the longest axis, on two links a row of a closed ring.
        ("all-to-all", (4, 4, 4), 4 / 8 / 90),
        ("all-to-all", (2, 2, 2), 2 / 4 / 90),
    ],
)
def test_tpus(kind, shape, expected):
    devices = torus(*shape)
    group = f"[1,{len(devices)}]<=[{len(devices)}]"
    assert seconds(Traffic(kind, group), GB, devices, CHIPS["v5p"]) == pytest.approx(expected)


def test_parts_of_a_torus():
    """An axis of a 4 x 4 x 4 torus is a closed ring; of every second device on it, two groups share the links."""
    devices = torus(4, 4, 4)
    assert seconds(
        Traffic("all-gather", "[16,4]<=[64]"), GB, devices, CHIPS["v5p"]
    ) == pytest.approx(3 / 4 / 180)
    every_second = Traffic("all-gather", "[32,2]<=[16,2,2]T(0,2,1)")
    assert seconds(every_second, GB, devices, CHIPS["v5p"]) == pytest.approx(1 / 2 / (90 * 2 / 3))


def test_a_group_of_one_sends_nothing():
    assert seconds(Traffic("all-gather", "[8,1]<=[8]"), GB, hosts(8), CHIPS["h200"]) == 0

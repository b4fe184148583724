"""The scaling study: its topologies, and what it computes from a compiled step's counts."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from benchmarks import scaling
from benchmarks.scaling import collective_seconds, impossible, point, shape
from sdar_jax.devices.sharding import MESH_AXES
from sdar_jax.planning import Memory, Roofline
from sdar_jax.planning.network import Link


@pytest.mark.parametrize(
    ("chip", "devices", "expected"),
    [
        ("v5p", 8, "v5p:2x2x2"),
        ("v5p", 128, "v5p:4x4x8"),
        ("v5p", 4096, "v5p:16x16x16"),
        ("v6e", 8, "v6e:2x4"),
        ("v5e", 64, "v5e:8x8"),
        ("v5e", 4096, "v5e:16x16"),
        ("h200", 8, "h200:8"),
        ("h200", 512, "h200:64x8"),
    ],
)
def test_shapes_hold_the_devices_or_a_slice_of_them(chip, devices, expected):
    assert shape(chip, devices) == expected


@dataclass(frozen=True)
class Device:
    id: int
    process_index: int


def mesh(devices: int) -> Mesh:
    """H200s on hosts of 8: fsdp, and context over 4."""
    places = np.empty(devices, object)
    places[:] = [Device(i, i // 8) for i in range(devices)]
    return Mesh(places.reshape(1, devices // 4, 1, 4, 1), MESH_AXES)


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """128 rows in 4 micro-batches on 64 devices, with 7 GB of weights on each."""
    monkeypatch.setattr(scaling, "mesh_of", lambda step, chip, devices: mesh(devices))
    data = SimpleNamespace(batch_size=128)
    config = SimpleNamespace(data=data, micro_batch_size=32)
    return SimpleNamespace(config=config, mesh=mesh(64), memory=Memory(7e9, 0, 14e9, 0, 0, 0, 0))


# Of weights 45 GB a step are gathered, of tokens 9 GB are exchanged by each device; a device's 15 PFLOP take 15.2 s.
LINKS = [Link("all-gather", "fsdp", 45e9, 0, 0), Link("all-to-all", "context", 9e9, 0, 0)]
ROOF = Roofline(10e15, 12e15, 3e15, 4.8e12, LINKS, 0, 0, 0)


def test_more_devices_share_the_rows_and_gather_the_same_weights(step):
    """Two devices of each host gather from 8 hosts, or from 64, by a network card each; tokens stay within a host."""
    weights, tokens = collective_seconds(step, ROOF, "h200", 64)
    assert weights == pytest.approx(45 * 7 / 8 / (2 * 50)) and tokens == pytest.approx(
        9 * 3 / 4 / 450
    )
    wider = collective_seconds(step, ROOF, "h200", 512)[0]
    assert wider == pytest.approx(45 * 63 / 64 / (2 * 50))
    weak, strong = (point(step, ROOF, "h200", 512, strong=strong) for strong in (False, True))
    assert weak.collectives == pytest.approx(wider + tokens)
    assert weak.compute == pytest.approx(15e15 / 989e12) and weak.memory == pytest.approx(1)
    # An eighth of the rows, in one micro-batch of four.
    assert strong.collectives == pytest.approx(wider / 4 + tokens / 8)
    assert strong.compute == pytest.approx(weak.compute / 8)
    assert strong.mfu(strong.compute, 989e12) == pytest.approx(10 / 15)


def test_what_cannot_be_shared(step):
    assert impossible(step, "h200", 64, strong=True) is None
    assert impossible(step, "h200", 2, strong=False) == "the mesh needs 4"
    assert impossible(step, "h200", 1024, strong=True) == "less than a row per device"
    assert impossible(step, "h200", 1024, strong=False) is None
    assert impossible(step, "h200", 8, strong=False) == "224 GB of weights, gradients and optimiser"

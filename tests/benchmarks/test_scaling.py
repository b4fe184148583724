"""Topologies of the scaling study."""

import pytest

from benchmarks.scaling import shape


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

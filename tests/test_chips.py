"""Names of chips and topologies; that compilers take them is shown by tests/compile."""

import pytest

from sdar_jax.chips import CHIPS, peak_flops, topology
from sdar_jax.errors import ConfigError
from tests.bad_input import refused


@pytest.mark.parametrize("name", ["h200", "b200:8", "v5p:", "h200:8x", "H200:8", "v5p 2x2"])
def test_unknown_topologies(name):
    with refused(ConfigError, repr(name), "'v5p:4x4x4'"):
        topology(name)


def test_peaks_agree_with_the_chips():
    kinds = {
        "h200": "NVIDIA H200",
        "h100": "NVIDIA H100 80GB HBM3",
        "v5p": "TPU v5",
        "v5e": "TPU v5 lite",
        "v6e": "TPU v6e",
    }
    assert {name: peak_flops(kind) for name, kind in kinds.items()} == {
        name: chip.bf16_flops for name, chip in CHIPS.items()
    }
    assert peak_flops("cpu") is None

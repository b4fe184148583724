"""What is measured, on tiny shapes: figures mean nothing here, but that there are some."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from sdar_jax.attention import chunked
from sdar_jax.attention.paged import xla
from sdar_jax.devices.chips import CHIPS, chip_of
from sdar_jax.experts import grouped
from sdar_jax.proof import speed

SCAN = SimpleNamespace(
    product=partial(grouped.tiled_dot, skipping=False),
    weight_gradient=partial(grouped.tiled_weight_gradient, skipping=False),
)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("op", "module", "count"),
    [("attention", chunked, 4), ("paged attention", xla, 2), ("experts", SCAN, 2)],
)
def test_kernels_beside_xla(op: str, module: Any, count: int):
    found = list(speed.kernel_speeds(op, module))
    assert len({each["measured"] for each in found}) == count
    assert all(each["seconds"] > 0 and each["xla_seconds"] > 0 for each in found)
    assert all(("bytes" in each) == (op == "paged attention") for each in found)


@pytest.mark.slow
@pytest.mark.ci
def test_decoding_forwards(monkeypatch):
    """The floor is of the weights but the embedding, and all keys and values, at the chip's bandwidth."""
    monkeypatch.setattr(speed, "chip_of", lambda _: CHIPS["h200"])
    found = list(speed.decoding_forwards())
    assert len(found) == 4 and all(each["seconds"] > 0 for each in found)
    layer = 16 * 8 * (2 + 1 + 1 + 2) + 3 * 16 * 32 + 2 * 16 + 2 * 8
    weights = 2 * layer + 16 + 64 * 16
    pages = 2 * 2 * 64 * 8
    assert found[0]["floor_seconds"] * CHIPS["h200"].bandwidth == 2 * (weights + pages)


def test_chips_by_the_name_that_jax_gives_them():
    assert chip_of("NVIDIA H200") == CHIPS["h200"] and chip_of("TPU v5 lite") == CHIPS["v5e"]
    assert chip_of("TPU v5") == CHIPS["v5p"] and chip_of("NVIDIA H100 PCIe") is None
    assert chip_of("cpu") is None

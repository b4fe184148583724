"""Names of chips and topologies; that compilers take them is shown by tests/compile."""

import importlib.util
from types import SimpleNamespace

import jax
import pytest

from sdar_jax.devices.chips import (
    CHIPS,
    check_backend,
    compiling_for,
    device,
    peak_flops,
    platform,
    topology,
)
from sdar_jax.errors import ConfigError
from tests.bad_input import refused


@pytest.mark.parametrize("name", ["h200", "b200:8", "v5p:", "h200:8x", "H200:8", "v5p 2x2"])
def test_unknown_topologies(name):
    with refused(ConfigError, repr(name), "'v5p:4x4x4'"):
        topology(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "tpu"), ("h100:8", "cuda12")])
def test_a_missing_compiler_is_told_with_what_brings_it(monkeypatch, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with refused(ConfigError, name.partition(":")[0], "make compilers", f"sdar-jax[{extra}]"):
        topology(name)


def test_what_is_traced_follows_the_chip_that_is_compiled_for():
    chip = SimpleNamespace(platform="tpu", device_kind="TPU v5")
    assert platform() == "cpu"
    with compiling_for(chip):
        assert platform() == "tpu" and device() is chip
    assert platform() == "cpu" and device() is jax.devices()[0]


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


@pytest.mark.parametrize(
    ("asked", "fix"),
    [
        ("cuda", r"install sdar-jax\[cuda12\] and see that the GPU is there, or unset it"),
        ("gpu,cpu", r"install sdar-jax\[cuda12\]"),
        ("tpu", r"install sdar-jax\[tpu\] and see that the TPU is there"),
        ("nonsense", r"set it to cpu, or unset it"),
    ],
)
@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize\nbackend")])
def test_a_backend_that_is_not_here_is_one_line(asked, fix, error, monkeypatch):
    """What JAX raises: an assertion where a plugin is missing, an error of several lines where a device is."""

    def fail():
        raise error

    check_backend()
    fake = SimpleNamespace(devices=fail, config=SimpleNamespace(jax_platforms=asked))
    monkeypatch.setattr("sdar_jax.devices.chips.jax", fake)
    with pytest.raises(
        ConfigError, match=rf"JAX_PLATFORMS is '{asked}' and JAX cannot .*; {fix}"
    ) as raised:
        check_backend()
    assert "\n" not in str(raised.value)

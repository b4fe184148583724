"""The chips this library is for: what each can do, and how to compile for one that is not here.

Peaks are the vendors' figures for one chip, dense, without sparsity.
"""

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.topologies import TopologyDescription, get_topology_desc

from sdar_jax.errors import ConfigError


class Chip(NamedTuple):
    """The figures of a chip.

    Attributes:
        platform: "gpu" or "tpu".
        bf16_flops: FLOP/s of bfloat16 matmuls with float32 sums.
        memory: bytes of HBM.
        bandwidth: bytes/s of HBM.
        link: bytes/s, in one direction, of a GPU's NVLink or of one link of a TPU's torus.
        between: bytes/s of a device to those of other hosts (InfiniBand) or other slices.
        ring: an axis of the torus is a closed ring where its length is a multiple of this.
    """

    platform: str
    bf16_flops: float
    memory: float
    bandwidth: float
    link: float
    between: float
    ring: int = 0


CHIPS = {
    "h200": Chip("gpu", 989e12, 141e9, 4.8e12, 450e9, 50e9),
    "h100": Chip("gpu", 989e12, 80e9, 3.35e12, 450e9, 50e9),
    "v5p": Chip("tpu", 459e12, 95e9, 2.765e12, 90e9, 6e9, ring=4),
    "v6e": Chip("tpu", 918e12, 32e9, 1.64e12, 90e9, 6e9, ring=16),
    "v5e": Chip("tpu", 197e12, 16e9, 0.82e12, 45e9, 6e9, ring=16),
}

# Dense bfloat16 FLOP/s by the start of JAX's device_kind, from the vendors' data sheets; the first that fits.
_PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}

# The start of JAX's device_kind of each.
_KINDS = {
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}

# What XLA asks of a Hopper GPU when none is there: a GpuTargetConfigProto.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "NVIDIA {name}"
"""


# Where the compilers alone are installed: outside the environment, in which JAX would look for their chips.
COMPILERS = Path(".cache/compilers")
# The module of each platform's compiler, and the extra that installs it.
_MODULES = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_plugins", "cuda12")}


def topology(name: str) -> TopologyDescription:
    """Describes devices to compile for: "v5p:2x2x1" and the like (libtpu's own names), "h200:8" (one host), "h200:4x8"
    (4 hosts).

    Needs libtpu for TPU, the CUDA plugin for GPU; the chips themselves need not be there.

    Raises:
        ConfigError: a chip or shape that is not understood, or that has no compiler here or none that takes it.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
    if match is None or match[1] not in CHIPS:
        raise ConfigError(
            f"topology {name!r} is unknown; use a chip of {tuple(CHIPS)} and a shape, as in 'v5p:4x4x4'"
        )
    module, extra = _MODULES[CHIPS[match[1]].platform]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"no compiler for {match[1]} is here; install sdar-jax[{extra}], or run `make compilers` in a checkout"
        )
    try:
        return _described(name, *match.groups())
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"topology {name!r} is not one that its compiler takes ({reason}); use another"
        ) from None


def _described(name: str, chip: str, shape: str) -> TopologyDescription:
    if CHIPS[chip].platform == "tpu":
        return get_topology_desc(platform="tpu", topology_name=name)
    hosts, _, devices = shape.rpartition("x")
    config = _HOPPER.format(
        bandwidth=int(CHIPS[chip].bandwidth),
        memory=151397597184 if chip == "h200" else 85899345920,
        name=chip.upper(),
    )
    return get_topology_desc(
        platform="cuda",
        topology_name=chip,
        topology=f"1x{hosts or 1}x{devices}",
        target_config=config,
    )


_target: Any = None


@contextlib.contextmanager
def compiling_for(device: Any) -> Iterator[None]:
    """Makes what is traced inside be for such a device, of a `topology`, and not for those that are here.

    Functions that were jitted and traced before keep what they chose.
    """
    global _target
    before = _target
    _target = device
    try:
        yield
    finally:
        _target = before


def is_compiling_for() -> bool:
    """Returns whether what is traced is for a device that is not here."""
    return _target is not None


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": what to compute on, by which kernels and sizes are chosen."""
    return jax.default_backend() if _target is None else _target.platform


class CpuKind(NamedTuple):
    """What of an x86 CPU its matmuls depend on.

    Attributes:
        vendor: as it names itself: "AuthenticAMD", "GenuineIntel".
        avx512: whether it has AVX-512.
    """

    vendor: str
    avx512: bool


@lru_cache(maxsize=1)
def cpu_kind() -> CpuKind | None:
    """Returns the kind of this machine's x86 CPU; None where that cannot be told, or for another CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    vendor, flags = (
        re.search(rf"^{name}\s*:(.*)$", text, re.MULTILINE) for name in ("vendor_id", "flags")
    )
    if vendor is None or flags is None:
        return None
    return CpuKind(vendor[1].strip(), "avx512f" in flags[1].split())


def device() -> Any:
    """Returns the first device to compute on; only its properties can be read."""
    return jax.devices()[0] if _target is None else _target


def check_backend() -> None:
    """Starts JAX's devices. Raises ConfigError where JAX_PLATFORMS asks for a platform that is not here."""
    try:
        jax.devices()
    # The platform's plugin is missing, which JAX asserts or says, or finds no device.
    except (AssertionError, RuntimeError) as error:
        platforms = jax.config.jax_platforms or ""
        names = {"cuda": "gpu", "gpu": "gpu", "tpu": "tpu"}
        known = next((names[name] for name in platforms.split(",") if name in names), None)
        reason = " ".join(str(error).split()) or "it has no plugin for it"
        fix = "set it to cpu, or unset it"
        if known is not None:
            fix = f"install sdar-jax[{_MODULES[known][1]}] and see that the {known.upper()} is there, or unset it"
        raise ConfigError(
            f"JAX_PLATFORMS is {platforms!r} and JAX cannot use that here ({reason}); {fix}"
        ) from None


def not_hopper() -> str | None:
    """Says why kernels for Hopper cannot run on the GPU to compute on; None if they can, or if it is no GPU."""
    if platform() != "gpu" or (capability := device().compute_capability) == "9.0":
        return None
    return f"the GPU has compute capability {capability}, not 9.0 (Hopper)"


def peak_flops(device_kind: str) -> float | None:
    """Looks up the dense bfloat16 FLOP/s of a known accelerator, by its `jax.Device.device_kind`; None for any other
    device."""
    return next((peak for kind, peak in _PEAK_FLOPS.items() if device_kind.startswith(kind)), None)


def chip_of(device_kind: str) -> Chip | None:
    """Looks up the figures of a device by its `device_kind`; None for one that is not in `CHIPS`."""
    names = (name for kind, name in _KINDS.items() if device_kind.startswith(kind))
    return next((CHIPS[name] for name in names), None)

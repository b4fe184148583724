"""What sdar-jax finds here: versions, devices, what computes each operation, caches, and what is missing."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

_PACKAGES = (
    "sdar-jax",
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "numpy",
)
_PACKAGES += (
    "ml_dtypes",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "qwix",
    "optax",
)
_PACKAGES += ("orbax-checkpoint", "grain", "pyarrow", "tyro")
# What lets JAX use an accelerator: one of these.
_PLUGINS = {"gpu": ("jax-cuda12-plugin", "jax-cuda13-plugin"), "tpu": ("libtpu",)}
# Their names in JAX_PLATFORMS.
_PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}
# The oldest driver that CUDA 13 runs on.
_CUDA_13_DRIVER = 580
_GOOGLE = "0x1ae0"

Report = dict[str, Any]


class Accelerator(NamedTuple):
    """attached: what was found, without JAX. installed: packages that let JAX use it. install: the command for one."""

    attached: str | None
    installed: list[str]
    install: str


class Operation(NamedTuple):
    """no_kernel: why none of the kernels takes it; None if one does. proof: what is known of that kernel here."""

    operation: str
    inputs: str
    implementation: str
    no_kernel: str | None
    proof: str | None


class Problem(NamedTuple):
    """What is wrong, and the command or change that mends it."""

    problem: str
    fix: str


def main(arguments: Sequence[str], program: str = "sdar-jax doctor") -> int:
    """Prints the report. Returns the exit status: 0, whatever was found; with --prove 1 if a kernel is not right."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="one JSON object; sizes are in bytes")
    parser.add_argument(
        "--prove",
        action="store_true",
        help="check every kernel for the chip that is here and time it, minutes; writes one file to send",
    )
    options = parser.parse_args(arguments)
    if options.prove:
        from sdar_jax.cli.prove import prove

        return prove(_without_devices())
    found = report()
    print(json.dumps(found, indent=1) if options.json else "\n".join(_lines(found)))
    return 0


def report(root: Path = Path("/")) -> Report:
    """All that is found, as JSON holds it. root: where dev, proc and sys are."""
    accelerators = {"gpu": _gpu(root), "tpu": _tpu(root)}
    devices, failure = _devices()
    return {
        "versions": _versions(),
        "host": _host(),
        "devices": devices,
        "operations": [] if failure else [operation._asdict() for operation in _operations()],
        "compilation_cache": None if failure else _compilation_cache(),
        "disk": [
            {"path": str(path), "free": shutil.disk_usage(path).free} for path in _written_to()
        ],
        "accelerators": {name: accelerator._asdict() for name, accelerator in accelerators.items()},
        "compilers": None if failure else _compilers(),
        "problems": [problem._asdict() for problem in _problems(accelerators, devices, failure)],
    }


def _without_devices() -> Report:
    """What is known without starting JAX's devices, of which a TPU serves one process alone."""
    return {"versions": _versions(), "host": _host()}


def _versions() -> Report:
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _host() -> Report:
    return {"system": platform.platform(), "cpus": os.cpu_count(), "memory": _host_memory()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpu(root: Path) -> Accelerator:
    """By the driver, of which containers too see the version."""
    file = root / "proc/driver/nvidia/version"
    driver = (
        re.search(r"Kernel Module.*?\s(\d+)\.[\d.]+", file.read_text()) if file.exists() else None
    )
    extra = "cuda13" if driver and int(driver[1]) >= _CUDA_13_DRIVER else "cuda12"
    return _accelerator("gpu", driver and f"NVIDIA driver {driver[1]}", extra)


def _tpu(root: Path) -> Accelerator:
    """By the device files of its chips, and the vendor on the bus: other devices have files of this name too."""
    files = [*root.glob("dev/accel[0-9]*"), *root.glob("dev/vfio/[0-9]*")]
    vendors = {file.read_text().strip() for file in root.glob("sys/bus/pci/devices/*/vendor")}
    return _accelerator(
        "tpu", f"{len(files)} chips" if files and _GOOGLE in vendors else None, "tpu"
    )


def _accelerator(name: str, attached: str | None, extra: str) -> Accelerator:
    installed = [package for package in _PLUGINS[name] if _version(package) is not None]
    # With jax's own extra: the package here may come from a checkout, in which `pip install sdar-jax[...]` is another.
    version = _version("jax")
    wanted = f"jax[{extra}]=={version}" if version else f"jax[{extra}]"
    return Accelerator(attached, installed, shlex.join(["pip", "install", wanted]))


def _devices() -> tuple[list[Report], str | None]:
    """The devices of this process, with the memory that JAX may take where it is known; or why there are none."""
    try:
        import jax

        devices = jax.local_devices()
    # Plugins that do not fit, drivers, a wrong JAX_PLATFORMS: each raises what it likes.
    except Exception as error:
        return [], f"{type(error).__name__}: {' '.join(str(error).split())}"
    memory = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return [
        {"platform": device.platform, "kind": device.device_kind, "memory": size}
        for device, size in zip(devices, memory, strict=True)
    ], None


def _operations() -> Iterator[Operation]:
    """What is chosen for SDAR-8B, and for the experts of SDAR-30B-A3B, in the type of their activations here."""
    import jax
    import jax.numpy as jnp

    from sdar_jax.attention import api as attention
    from sdar_jax.attention.paged import api as paged
    from sdar_jax.devices.chips import platform as backend
    from sdar_jax.experts import grouped

    dtype = jnp.float32 if backend() == "cpu" else jnp.bfloat16
    like = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    q, k = like(1, 4096, 32, 128), like(1, 4096, 8, 128)
    yield _operation(attention, q, k, k)
    window, pages = like(8, 4, 32, 128), like(64, 8, 64, 128)
    table, visible = like(8, 8, dtype=jnp.int32), like(8, 4, dtype=jnp.int32)
    yield _operation(paged, window, pages, pages, table, visible)
    yield _operation(grouped, like(32768, 2048), like(128, 2048, 768))


def _operation(door: Any, *inputs: Any) -> Operation:
    import jax

    from sdar_jax import verdicts

    found: list[Any] = []
    with verdicts.looking():
        # Arrays as the operation sees them when it is compiled.
        jax.eval_shape(
            lambda *arrays: found.extend((door.choose(*arrays), door.no_kernel(*arrays))), *inputs
        )
    implementation = getattr(found[0], "implementation", found[0])
    shape = f"{inputs[0].dtype}{list(inputs[0].shape)}"
    proof = None if found[1] else _proof(door.OP.kernel_here())
    return Operation(door.OP.op, shape, implementation, found[1], proof)


def _proof(kernel: tuple[str, str] | None) -> str | None:
    """What is known of a kernel on the chip that is here; None where it needs no proof."""
    from sdar_jax import verdicts
    from sdar_jax.devices.chips import is_compiling_for

    if kernel is None or is_compiling_for():
        return None
    verdict = verdicts.read(verdicts.Place.here(verdicts.Kernel(*kernel)))
    if verdict is None:
        return "not checked here yet, the first use will; or sdar-jax doctor --prove"
    return "checked here" if verdict.right else f"{verdict.outcome}: {verdict.reason}"


def _compilation_cache() -> Report:
    """Where commands keep what they compile."""
    from sdar_jax.cli.compilation import keep_programs

    directory = keep_programs()
    files = [file for file in directory.rglob("*") if file.is_file()] if directory else []
    size = sum(file.stat().st_size for file in files)
    return {"directory": None if directory is None else str(directory), "size": size}


def _written_to() -> list[Path]:
    """The working directory, and where the hub's models are kept, or will be."""
    from huggingface_hub.constants import HF_HUB_CACHE

    hub = Path(HF_HUB_CACHE).expanduser().absolute()
    return [Path.cwd(), next(path for path in (hub, *hub.parents) if path.exists())]


def _compilers() -> Report:
    """Whether `sdar-jax plan` has compilers for chips that are not here, and the command that installs them alone."""
    from sdar_jax.devices.chips import COMPILERS

    modules = {"gpu": "jax_plugins", "tpu": "libtpu"}
    here = {
        name: (COMPILERS / module).is_dir() or importlib.util.find_spec(module) is not None
        for name, module in modules.items()
    }
    pins = _pins("tpu") | _pins("cuda12")
    plugin = pins.get("jax-cuda12-plugin", "")
    wanted = [
        f"libtpu{pins.get('libtpu', '')}",
        f"jax-cuda12-plugin{plugin}",
        f"jax-cuda12-pjrt{plugin}",
    ]
    install = [
        "pip",
        "install",
        "--no-deps",
        "--target",
        str(COMPILERS),
        *wanted,
        "nvidia-cuda-runtime-cu12",
    ]
    return {**here, "install": shlex.join(install)}


def _pins(extra: str) -> dict[str, str]:
    """The versions that this jax asks for in one of its extras."""
    found = (Requirement(text) for text in importlib.metadata.requires("jax") or [])
    return {
        each.name: str(each.specifier)
        for each in found
        if each.marker and each.marker.evaluate({"extra": extra})
    }


def _problems(
    accelerators: dict[str, Accelerator], devices: list[Report], failure: str | None
) -> Iterator[Problem]:
    yield from _requirements()
    chosen = os.environ.get("JAX_PLATFORMS")
    if failure is not None:
        yield Problem(
            f"JAX does not start: {failure}",
            "unset JAX_PLATFORMS" if chosen else "install what it names",
        )
    for name, accelerator in accelerators.items():
        yield from _mismatches(accelerator)
        if accelerator.attached and not any(device["platform"] == name for device in devices):
            what = f"a {name.upper()} is here ({accelerator.attached}), which JAX does not use"
            fix = f"start with JAX_PLATFORMS={_PLATFORMS[name]} to see why"
            if chosen:
                fix = f"unset JAX_PLATFORMS, which is {chosen}"
            if not accelerator.installed:
                fix = accelerator.install
            yield Problem(what, fix)


def _requirements() -> Iterator[Problem]:
    """Packages that are not installed, or not in a version that this one takes."""
    required = importlib.metadata.requires("sdar-jax") if _version("sdar-jax") else None
    for needed in map(Requirement, required or []):
        version = _version(needed.name)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        if version is None or not needed.specifier.contains(version, prereleases=True):
            has = "is not installed" if version is None else f"is {version}"
            yield Problem(
                f"{needed.name} {has}, and {needed} is needed",
                shlex.join(["pip", "install", str(needed)]),
            )


def _mismatches(accelerator: Accelerator) -> Iterator[Problem]:
    plugins = [package for package in accelerator.installed if package.startswith("jax-")]
    if len(plugins) > 1:
        unwanted = "cuda12" if "cuda13" in accelerator.install else "cuda13"
        fix = f"pip uninstall jax-{unwanted}-plugin jax-{unwanted}-pjrt"
        yield Problem(f"{' and '.join(plugins)} are both installed", fix)
    for package in plugins:
        if (version := _version(package)) != _version("jaxlib"):
            yield Problem(
                f"{package} is {version}, and jaxlib {_version('jaxlib')}", accelerator.install
            )


def _lines(found: Report) -> Iterator[str]:
    versions = {name: version for name, version in found["versions"].items() if version is not None}
    yield "versions"
    yield from _wrapped(f"{name} {version}" for name, version in versions.items())
    host = found["host"]
    yield f"\nhost\n  {host['system']}, {host['cpus']} CPUs, {_gigabytes(host['memory'])}"
    yield "\ndevices"
    for (kind, memory), count in Counter(
        (device["kind"], device["memory"]) for device in found["devices"]
    ).items():
        yield f"  {count} x {kind}" + (f", {_gigabytes(memory)} each for JAX" if memory else "")
    for name, accelerator in found["accelerators"].items():
        if not accelerator["attached"] and not accelerator["installed"]:
            yield f"  no {name.upper()} is attached; where there is one: {accelerator['install']}"
    yield "\noperations"
    for each in found["operations"]:
        known = f"; {each['proof']}" if each["proof"] else _reason(each["no_kernel"])
        yield f"  {each['operation']:16} {each['implementation']:12} {each['inputs']}{known}"
    yield "\ncaches and disk"
    cache: Report = found["compilation_cache"] or {"directory": None}
    told = (
        f"{cache['directory']}, {_gigabytes(cache['size'])}"
        if cache["directory"]
        else (
            "none, every start compiles anew; SDAR_JAX_CACHE_DIR=DIR keeps them in a folder that can be written"
        )
    )
    yield f"  compiled programs: {told}"
    yield from (f"  {_gigabytes(disk['free'])} free in {disk['path']}" for disk in found["disk"])
    compilers = found["compilers"] or {}
    missing = [name.upper() for name in ("gpu", "tpu") if not compilers.get(name)]
    if compilers and missing:
        yield f"  no compiler for {' and '.join(missing)}, which plans want: {compilers['install']}"
    yield "\nproblems"
    for each in found["problems"]:
        yield f"  {each['problem']}"
        yield f"      {each['fix']}"
    if not found["problems"]:
        yield "  none"


def _wrapped(words: Iterable[str]) -> list[str]:
    return textwrap.wrap(
        ", ".join(words), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def _reason(no_kernel: str | None) -> str:
    return f"; no kernel: {no_kernel}" if no_kernel else ""


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"

"""`sdar-jax doctor`: what it reports of machines that are and are not here, and that its advice fits them."""

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdar_jax.cli import doctor
from sdar_jax.devices.chips import compiling_for

KERNELS = {"attention": "mosaic_gpu", "paged attention": "mosaic_gpu", "experts": "mosaic_gpu"}


def problems(root: Path) -> dict[str, str]:
    return {each["problem"]: each["fix"] for each in doctor.report(root)["problems"]}


def operations() -> dict[str, tuple[str, str | None]]:
    return {
        each["operation"]: (each["implementation"], each["no_kernel"])
        for each in doctor.report()["operations"]
    }


def test_a_sound_environment(capsys, tmp_path):
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["versions"]["jax"] == importlib.metadata.version("jax")
        and found["host"]["memory"] > 1e9
    )
    assert {device["platform"] for device in found["devices"]} == {"cpu"}
    assert Path.cwd() in [Path(disk["path"]) for disk in found["disk"]]
    assert doctor.report(tmp_path)["problems"] == []
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert (
        "jax " + found["versions"]["jax"] in text and "none for cpu" in text and "1 x cpu" in text
    )


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n",
            "cuda12",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n",
            "cuda13",
        ),
    ],
)
def test_a_gpu_that_is_not_used(line, extra, tmp_path, monkeypatch):
    file = tmp_path / "proc/driver/nvidia/version"
    file.parent.mkdir(parents=True)
    file.write_text(line)
    ((problem, fix),) = problems(tmp_path).items()
    assert "GPU" in problem and {"cuda12": "550", "cuda13": "580"}[extra] in problem
    assert fix == f"pip install 'jax[{extra}]=={importlib.metadata.version('jax')}'"


@pytest.mark.parametrize("device", ["accel0", "vfio/0"])
@pytest.mark.parametrize("vendor", ["0x1ae0", "0x10de"])
def test_a_tpu_that_is_not_used(device, vendor, tmp_path):
    for name, text in {
        f"dev/{device}": "",
        "dev/vfio/vfio": "",
        "sys/bus/pci/devices/0/vendor": f"{vendor}\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    expected = (
        {f"pip install 'jax[tpu]=={importlib.metadata.version('jax')}'"}
        if vendor == "0x1ae0"
        else set()
    )
    assert set(problems(tmp_path).values()) == expected


def test_packages_that_do_not_fit(tmp_path, monkeypatch):
    versions = {"flax": "0.11.0", "jax-cuda12-plugin": "0.10.0", "jax-cuda13-plugin": "0.10.0"}
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: versions.get(name) or real(name)
    )
    found = problems(tmp_path)
    flax = next(fix for problem, fix in found.items() if problem.startswith("flax is 0.11.0"))
    assert flax.startswith("pip install 'flax")
    assert "pip uninstall jax-cuda13-plugin jax-cuda13-pjrt" in found.values()
    assert any(problem.startswith("jax-cuda12-plugin is 0.10.0, and jaxlib") for problem in found)


def test_a_jax_that_does_not_start(tmp_path, monkeypatch, capsys):
    def fail():
        raise RuntimeError("Unable to\ninitialize")

    monkeypatch.setattr("jax.local_devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert problems(tmp_path) == {
        "JAX does not start: RuntimeError: Unable to initialize": "unset JAX_PLATFORMS"
    }
    assert doctor.main([]) == 0 and "Unable to initialize" in capsys.readouterr().out


def test_what_computes_where():
    with compiling_for(
        SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
    ):
        assert operations() == {name: (kernel, None) for name, kernel in KERNELS.items()}
    with compiling_for(
        SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
    ):
        found = operations()
    assert {name: implementation for name, (implementation, _) in found.items()} == {
        "attention": "chunked",
        "paged attention": "xla",
        "experts": "tiled",
    }
    assert all("8.0, not 9.0" in str(reason) for _, reason in found.values())
    with compiling_for(SimpleNamespace(platform="tpu", device_kind="TPU v5")):
        assert operations() == {
            "attention": ("mosaic_tpu", None),
            "paged attention": ("mosaic_tpu", None),
            "experts": ("ragged_dot", None),
        }


def test_compilers_are_those_of_this_jax():
    """What the command installs is not tried here: it downloads compilers."""
    command = doctor.report()["compilers"]["install"]
    assert command.startswith("pip install --no-deps --target .cache/compilers 'libtpu==0.")
    assert f">={importlib.metadata.version('jax')}" in command

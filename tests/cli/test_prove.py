"""`sdar-jax doctor --prove` on a machine without kernels, and with kernels made right and wrong on purpose."""

import json

import pytest

from sdar_jax import verdicts
from sdar_jax.cli import doctor, prove
from sdar_jax.cli.prove import Part
from sdar_jax.verdicts import Kernel, Place

RIGHT = {"case": "a", "error": {"out": 1e-3}, "wrong": None, "seconds": 1.0}
WRONG = {**RIGHT, "wrong": "out is off by 0.3 (0.004 allowed) at [0, 1]"}
MEASURED = {
    "measured": "forward",
    "seconds": 2e-3,
    "xla_seconds": 8e-3,
    "flops": 5e14,
    "of_peak": 0.5,
}
T_F = {"measured": "t_f", "seconds": 1.5e-3, "floor_seconds": 1e-3}
TILES = [
    {
        "row": {"kernel": "dq"},
        "tile_sizes": {"query_tile": 128, "key_tile": 64, "stages": 4},
        "took": 2e-3,
    },
    {
        "row": {"kernel": "dq"},
        "tile_sizes": {"query_tile": 64, "key_tile": 64, "stages": 2},
        "took": 1e-3,
    },
    {
        "row": {"kernel": "dq"},
        "tile_sizes": {"query_tile": 64, "key_tile": 64, "stages": 3},
        "took": "other results",
    },
]


@pytest.fixture
def here(monkeypatch, tmp_path):
    monkeypatch.setenv("SDAR_JAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_machine_without_kernels(here, capsys):
    """Through the real process."""
    assert doctor.main(["--prove"]) == 0
    assert "there is no kernel for cpu" in capsys.readouterr().out
    assert list(here.glob("*.json")) == []


def test_one_file_says_all(here, monkeypatch, capsys):
    """The kernel that is wrong is not timed; what is right is kept as a verdict for the first use."""
    kernels = [["attention", "tests.proof.fakes.right"], ["attention", "tests.proof.fakes.exits"]]

    def run(task: str, *kernel: str, **environment: str) -> Part:
        place = Place.here(Kernel(*(kernel or ("", "jax"))))
        events = {
            "here": [{"platform": "gpu", "kernels": kernels}],
            "check-all": [{"begun": "a"}, RIGHT if "right" in kernel[-1] else WRONG]
            if kernel
            else [],
            "speed": [MEASURED],
            "tiles": TILES,
            "forward": [T_F],
        }[task]
        assert task != "forward" or environment == {verdicts.SWITCH: "1"}
        assert task not in ("speed", "tiles") or "right" in kernel[-1]
        return Part([{"ready": json.loads(json.dumps(place))}, *events], None)

    monkeypatch.setattr(prove, "run", run)
    assert doctor.main(["--prove"]) == 1
    told = capsys.readouterr().out
    for line in (
        "attention right: right",
        "  forward: 2.000 ms, 500.0 TFLOP/s, 50% of the peak, XLA takes 4.00 times as long",
        "  dq: best of 2 tiles 64 x 64 x 2, 1.000 ms; 128 x 64 x 4: 2.000 ms",
        "attention exits: wrong: out is off by 0.3 (0.004 allowed) at [0, 1] in 'a'",
        "  t_f: 1.500 ms, 1.50 times the floor of 1.000 ms",
    ):
        assert line in told.splitlines()
    (file,) = here.glob("sdar-jax-proof-cpu-*.json")
    assert str(file) in told
    found = json.loads(file.read_text())
    assert found["machine"]["versions"]["jax"] and found["machine"]["host"]["cpus"]
    assert [kernel["outcome"] for kernel in found["kernels"]] == ["right", "wrong"]
    assert found["kernels"][0]["speed"]["events"][-1] == MEASURED
    assert found["kernels"][0]["tiles"]["events"][-1]["took"] == "other results"
    kept = verdicts.read(Place.here(Kernel("attention", "tests.proof.fakes.right")))
    assert kept is not None and kept.right


def test_a_crash_costs_its_own_part(here, monkeypatch, capsys):
    """Through a real process that is taken along."""
    real = prove.run
    started = Part(
        [
            {"ready": ["", "", "cpu", {}]},
            {"platform": "cpu", "kernels": [["attention", "tests.proof.fakes.exits"]]},
        ],
        None,
    )

    def run(task: str, *kernel: str, **environment: str) -> Part:
        return real(task, *kernel, **environment) if task == "check-all" else started

    monkeypatch.setattr(prove, "run", run)
    assert doctor.main(["--prove"]) == 1
    assert "attention exits: crashes: exit status 3 in '" in capsys.readouterr().out


def test_what_does_not_start(here, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert doctor.main(["--prove"]) == 1
    assert "JAX does not start (exit status 1" in capsys.readouterr().out

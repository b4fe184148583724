"""What loading takes of each process' memory, by the benchmark's own figures at a smaller size."""

import sys

import pytest

from benchmarks import startup

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/status"),
]


def test_four_processes_hold_their_parts_and_a_tensor(tmp_path):
    startup.write(startup.shape(layers=2, width=1024, vocabulary=32768), tmp_path / "model")
    startup.write(startup.shape(layers=1, width=512, vocabulary=64), tmp_path / "small")
    largest = startup.largest_tensor(tmp_path / "model")
    assert largest == 2 * 32768 * 1024
    found = startup.measure(tmp_path / "model", tmp_path / "small", 4)
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    # All is split but the norms.
    assert [loaded.part for loaded in found] == [pytest.approx(size / 4, rel=0.001)] * 4
    for loaded in found:
        assert loaded.part <= loaded.peak <= startup.limit(loaded, largest), (loaded, largest)

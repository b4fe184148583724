"""Host memory while a model is loaded and saved: the model and a tensor or two, never a second model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
]
ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import threading
import time

import jax

from sdar_jax.model.config import ModelConfig
from sdar_jax.model import Model
from sdar_jax.hf.pretrained import load_pretrained, save_pretrained


def memory() -> float:
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0]) / 1024


class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.done = 0.0, False

    def run(self):
        while not self.done:
            self.most = max(self.most, memory())
            time.sleep(0.0005)

    def __enter__(self):
        self.start()
        self.before = memory()
        return self

    def __exit__(self, *exception):
        self.done = True
        self.join()


path = sys.argv[1]
config = ModelConfig(8192, 1024, 4096, 16, 16, 8, 64)
if sys.argv[2] == "make":
    save_pretrained(Model(config, jax.random.key(0)), path)
else:
    load_pretrained(path + "-small")
    with Peak() as loading:
        model = load_pretrained(path)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) / 2**20
    with Peak() as saving:
        save_pretrained(model, path + "-again")
    largest = 1024 * 8192 * 4 / 2**20
    print(size, largest, loading.most - loading.before, saving.most - saving.before)
"""


def run(*arguments: str) -> str:
    # A fixed threshold makes glibc give freed tensors back at once, so that what is measured is what is alive.
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=True
    ).stdout


def test_peak_of_loading_and_saving(tmp_path: Path) -> None:
    run(str(tmp_path / "model"), "make")
    os.symlink(ROOT / "tests" / "parity" / "fixtures" / "qwen3", tmp_path / "model-small")
    size, largest, loading, saving = map(float, run(str(tmp_path / "model"), "measure").split())
    print(
        f"model {size:.0f} MiB, largest tensor {largest:.0f}; loading adds {loading:.0f}, saving {saving:.0f}"
    )
    # Two tensors: what is read and what it becomes. The rest is the allocator's.
    assert size <= loading < size + 3 * largest
    assert saving < 4 * largest

"""`python train.py` as a person starts it: what it prints, how it ends, and that nothing can make a run different."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.training.conftest import (
    Values,
    assert_same_run,
    data_values,
    merged,
    metrics_of,
    run_values,
    state_of,
)

ROOT = Path(__file__).parents[2]
STEPS = 600


def start(*arguments: str, cache: Path) -> subprocess.Popen:
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    # A kill can leave a half-written entry in the compilation cache; JAX then compiles as if there were none.
    warnings = ("-W", "error", "-W", "ignore:Error reading persistent compilation cache entry")
    return subprocess.Popen(
        [sys.executable, *warnings, "train.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **compiled, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def cache() -> Path:
    return ROOT / ".cache" / "xla-tests"


def long_values(inputs: Path, run_dir: Path) -> Values:
    """A few seconds of steps, with a checkpoint and an evaluation every now and then."""
    held_out = data_values(inputs / "held-out.jsonl", epochs=1)
    changes = {
        "steps": STEPS,
        "model": {"shape": {"num_layers": 3}},
        "ema_decay": 0.9,
        "micro_batch_size": 2,
        "log_every": 1,
        "checkpoint": {"every": 25},
        "eval": {"data": held_out, "every": 70, "rows": 8, "samples": 2},
        "tensorboard": True,
    }
    return merged(run_values(inputs, run_dir), changes)


def write(directory: Path, values: Values) -> str:
    path = directory / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_an_error_is_one_line_and_status_2(tmp_path, cache):
    process = start(str(tmp_path / "nowhere.yaml"), cache=cache)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: ") and "nowhere.yaml" in err and err.count("\n") == 1


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_platform_that_is_not_here_is_one_line(script, inputs, tmp_path):
    config = write(tmp_path, run_values(inputs, tmp_path / "run"))
    arguments = (
        [config] if script == "train.py" else ["--model", str(tmp_path), "--prompt-ids", "1"]
    )
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cuda" if importlib.util.find_spec("jax_plugins") is None else "rocm",
    }
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: JAX_PLATFORMS is '") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def wait_for_lines(run_dir: Path, count: int, process: subprocess.Popen) -> None:
    file = run_dir / "metrics.jsonl"
    while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < count):
        time.sleep(0.05)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def undisturbed(inputs, cache, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    out, err = finish(start(write(directory, long_values(inputs, directory / "run")), cache=cache))
    assert (
        f"step {STEPS}/{STEPS} loss" in out and "held-out nelbo" in out and "finished, model" in err
    )
    return directory / "run"


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_so(number, undisturbed, inputs, cache, tmp_path):
    run_dir = tmp_path / "run"
    config = write(tmp_path, long_values(inputs, run_dir))
    process = start(config, cache=cache)
    wait_for_lines(run_dir, 40, process)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number, err
    step = state_of(run_dir)[0]
    assert f"stopped by a signal, saved at step {step}" in err
    assert 40 <= step < STEPS and metrics_of(run_dir)[-1]["step"] == step
    finish(start(config, cache=cache))
    assert_same_run(undisturbed, run_dir)


def kill_somewhere(process: subprocess.Popen, draw: random.Random) -> bool:
    """With kill -9: while it starts, or up to half a second of steps later. Whether it was still running."""
    if draw.random() < 0.25:
        time.sleep(draw.uniform(0, 5))
    else:
        assert process.stdout is not None
        next((line for line in process.stdout if line.startswith("step ")), None)
        time.sleep(draw.uniform(0, 0.5))
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("kills", [pytest.param(3, marks=pytest.mark.ci), 20])
def test_kill_9_at_any_moment_changes_nothing(kills, undisturbed, inputs, cache, tmp_path):
    """No run is lost or different, whenever it is killed and however often."""
    config = write(tmp_path, long_values(inputs, tmp_path / "run"))
    draw = random.Random(kills)
    hit = sum(kill_somewhere(start(config, cache=cache), draw) for _ in range(kills))
    assert hit >= 0.8 * kills
    finish(start(config, cache=cache))
    assert_same_run(undisturbed, tmp_path / "run")

"""The model of lm-evaluation-harness, in an environment that has the harness; `harness_checks` says what is checked."""

import os
import subprocess
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_harness_finds_the_model_by_its_entry_point():
    (found,) = [each for each in entry_points(group="lm_eval.models") if each.name == "sdar_jax"]
    assert found.value == "sdar_jax.evaluation.harness:HarnessModel"


def test_without_the_harness():
    with pytest.raises(ImportError, match="pip install 'lm-eval>=0.4.13'"):
        found = entry_points(group="lm_eval.models")["sdar_jax"].load()
        raise AssertionError(f"the harness is installed: {found}")


@pytest.mark.slow
@pytest.mark.network
def test_in_an_environment_with_the_harness(harness_python, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    checks = [harness_python, str(Path(__file__).with_name("harness_checks.py")), str(tmp_path)]
    done = subprocess.run(checks, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("passed") == 6

"""The model of lm-evaluation-harness, in an environment that has the harness; `harness_checks` says what is checked."""

import os
import subprocess
import sysconfig
import venv
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HARNESS = "lm-eval==0.4.13"


def test_the_harness_finds_the_model_by_its_entry_point():
    (found,) = [each for each in entry_points(group="lm_eval.models") if each.name == "sdar_jax"]
    assert found.value == "sdar_jax.evaluation.harness:HarnessModel"


def test_without_the_harness():
    with pytest.raises(ImportError, match="pip install 'lm-eval>=0.4.13'"):
        found = entry_points(group="lm_eval.models")["sdar_jax"].load()
        raise AssertionError(f"the harness is installed: {found}")


@pytest.mark.slow
@pytest.mark.network
def test_in_an_environment_with_the_harness(tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    # What is installed here, behind what the harness brings.
    packages = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    (packages / "here.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", HARNESS]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip(f"needs {HARNESS}, which cannot be installed here")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    checks = [python, str(Path(__file__).with_name("harness_checks.py")), str(tmp_path)]
    done = subprocess.run(checks, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("passed") == 5

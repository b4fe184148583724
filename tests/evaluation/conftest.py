"""An environment that has lm-evaluation-harness, for tests that run scripts in it."""

import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

HARNESS = "lm-eval[ifeval]==0.4.13"


@pytest.fixture(scope="session")
def harness_python(tmp_path_factory):
    """The Python of an environment with the harness, and behind what it brings, what is installed here."""
    folder = tmp_path_factory.mktemp("harness") / "env"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    (packages / "here.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", HARNESS]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip(f"needs {HARNESS}, which cannot be installed here")
    return Path(python)

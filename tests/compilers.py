"""Compiling for chips that are not here, in child processes: the compilers print on their own stdout and stderr.

The compilers are those of `make compilers`, or of the folder that the variable COMPILERS names.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILERS = Path(os.environ.get("COMPILERS", ROOT / ".cache" / "compilers"))

needs_compilers = pytest.mark.skipif(
    not (COMPILERS / "libtpu").is_dir(), reason="needs the TPU and CUDA compilers: make compilers"
)


def run_python(
    program: str, *arguments: str, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python -c program arguments...` with the compilers on its path; returns its output, whatever its status."""
    path = os.pathsep.join([str(COMPILERS), str(ROOT)])
    settings = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path,
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": "",
    }
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command,
        env={**os.environ, **settings, **environment},
        text=True,
        capture_output=True,
        timeout=timeout,
        cwd=ROOT,
    )

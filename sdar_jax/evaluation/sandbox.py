"""Runs a program that a model wrote: in a child process, with limits, in an empty folder, without the network.

Not a prison: the child has the user's rights to the file system, and a program that sets out to do harm can. So it is
asked for by name (`--allow-code`), and belongs into a container where models are not trusted.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10.0
MEMORY_BYTES = 2 * 2**30
FILE_BYTES = 2**20
_ERRORS_READ = 4096
_CHILD = Path(__file__).with_name("child.py")


def run_python(program: str, *, seconds: float = SECONDS) -> str | None:
    """Runs a program; None if it ends well, else why not, in a line.

    Args:
        seconds: of wall time; CPU time, memory, the size of files and the number of processes are bounded too.
    """
    with tempfile.TemporaryDirectory(prefix="sdar-jax-code-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "program.py").write_text(program, encoding="utf-8", errors="replace")
        limits = [str(int(seconds) + 1), str(MEMORY_BYTES), str(FILE_BYTES)]
        with (folder / "stderr").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(_CHILD), *limits, "program.py"],
                cwd=folder,
                env={"HOME": name, "TMPDIR": name, "PATH": "", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return f"no end within {seconds:g} s"
            finally:
                # What it started ends with it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status == 0:
            return None
        if status < 0:
            return f"ended by {signal.Signals(-status).name}"
        lines = (
            (folder / "stderr").read_bytes()[-_ERRORS_READ:].decode(errors="replace").split("\n")
        )
        said = [line.strip() for line in lines if line.strip()]
        return said[-1][:200] if said else f"exit status {status}"

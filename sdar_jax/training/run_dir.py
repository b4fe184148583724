"""The directory of a run: one job at a time, and the same one for all of its processes."""

import contextlib
import fcntl
import uuid
from collections.abc import Iterator
from pathlib import Path

from sdar_jax import processes
from sdar_jax.errors import ConfigError


@contextlib.contextmanager
def occupied(run_dir: Path) -> Iterator[None]:
    """Makes the directory, and keeps other jobs out of it until the end.

    Raises:
        ConfigError: it cannot be made, another job is in it, or it is not the same one for all processes.
    """
    with contextlib.ExitStack() as stack:
        if processes.is_first():
            stack.enter_context(_locked(run_dir))
        _check_shared(run_dir)
        yield


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("a")
    except OSError as error:
        raise ConfigError(f"run_dir '{run_dir}' cannot be made ({error.strerror}); choose another") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"run_dir '{run_dir}' is in use by another job; wait for its end, or choose another"
            ) from None
        except OSError:
            # Some network storage has no locks.
            pass
        yield


def _check_shared(run_dir: Path) -> None:
    def leave_a_file() -> str:
        path = run_dir / f".{uuid.uuid4().hex}"
        path.touch()
        return path.name

    mark = run_dir / processes.from_first(leave_a_file)
    seen = processes.gather(mark.exists())
    if processes.is_first():
        mark.unlink()
    if not all(seen):
        raise ConfigError(
            f"run_dir '{run_dir}' of process 0 is not that of process {seen.index(False)}; use storage that all share"
        )

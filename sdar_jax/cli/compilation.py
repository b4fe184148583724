"""How commands compile: what is compiled is kept for later starts, and what takes long says so while it runs.

The library leaves both to its caller: only commands come here.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import filelock
import jax
from jax import monitoring

from sdar_jax.devices.user_cache import user_cache_dir

# Bytes of programs that are kept; those used last stay. One for a CPU takes a megabyte, one of 8B for a TPU a hundred.
_MOST_KEPT = 4_000_000_000
_PATIENCE = 2.0
# JAX reports the start of each as a scalar and the end as a duration, under one name.
_COMPILE = "/jax/core/compile/backend_compile_duration"
_PHASES = {
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    _COMPILE,
}


def keep_programs() -> Path | None:
    """Has JAX keep what it compiles from now on; returns the folder, None where none is kept.

    The folder is `programs` in `user_cache_dir()`, for its owner alone, since whoever can write there can run code
    here. JAX's key of a program holds the devices it was compiled for, CPUs' features among them, so machines may
    share a home. What the caller has set stays: JAX_COMPILATION_CACHE_DIR is used as it is, and
    JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if given := jax.config.jax_compilation_cache_dir:
        return Path(given)
    folder = user_cache_dir() / "programs"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Also shows whether there is a right to write.
        _drop_half_written(folder)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MOST_KEPT)
    # Small ones too: a start compiles dozens of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def _drop_half_written(folder: Path) -> None:
    """Drops programs that a killed process did not finish writing, which JAX would neither read nor replace.

    JAX writes a program and then its time of use, under this lock.
    """
    with contextlib.suppress(filelock.Timeout), filelock.FileLock(folder / ".lockfile", timeout=1):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink()


@contextlib.contextmanager
def for_commands(*, quiet: bool = False) -> Iterator[None]:
    """Keeps what is compiled inside (`keep_programs`), and unless `quiet` says on stderr what takes over 2 seconds."""
    folder = keep_programs()
    if quiet:
        yield
        return
    said = "which is kept nowhere" if folder is None else f"kept in {folder} for later starts"
    announcer = _Announcer(said)
    monitoring.register_scalar_listener(announcer.start)
    monitoring.register_event_duration_secs_listener(announcer.end)
    try:
        yield
    finally:
        monitoring.unregister_scalar_listener(announcer.start)
        monitoring.unregister_event_duration_listener(announcer.end)


class _Announcer(threading.local):
    """Says, once for each program, that it is being traced, lowered or compiled when that has taken long."""

    def __init__(self, said: str):
        self._said = said
        self._timers: list[threading.Timer] = []
        self._announced = threading.Event()

    def start(self, event: str, value: float, **details: str | int) -> None:
        if event not in _PHASES:
            return
        name = str(details.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
        timer = threading.Timer(_PATIENCE, _say, (self._announced, name, self._said))
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def end(self, event: str, duration_secs: float, **details: str | int) -> None:
        if event in _PHASES and self._timers:
            self._timers.pop().cancel()
            if event == _COMPILE:
                self._announced.clear()


def _say(announced: threading.Event, name: str, said: str) -> None:
    if not announced.is_set():
        announced.set()
        print(f"compiling {name}, {said}", file=sys.stderr, flush=True)

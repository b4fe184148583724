"""The directory of a run: one job at a time, the same one for all of its processes, and whose the model in it is.

    run_dir/export.json     what a run has written to run_dir/model: its step and dtype, and whether it is complete

A model that is there without it is someone else's: it is neither taken for the run's result nor replaced.
"""

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdar_jax.devices import processes
from sdar_jax.errors import ConfigError
from sdar_jax.training.config import TrainConfig

_EXPORT = "export.json"


@contextlib.contextmanager
def occupied(run_dir: Path) -> Iterator[None]:
    """Makes the directory, and keeps other jobs out of it until the end.

    Raises:
        ConfigError: it cannot be made, another job is in it, or it is not the same one for all processes.
    """
    with contextlib.ExitStack() as stack:
        if processes.is_main_process():
            stack.enter_context(_locked(run_dir))
        _check_shared(run_dir)
        yield


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("a")
    except OSError as error:
        raise ConfigError(
            f"run_dir '{run_dir}' cannot be made ({error.strerror}); choose another"
        ) from None
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
        try:
            path.touch()
        except OSError as error:
            raise _not_written(run_dir, error) from None
        return path.name

    mark = run_dir / processes.broadcast(leave_a_file)
    seen = processes.gather(mark.exists())
    if processes.is_main_process():
        mark.unlink()
    if not all(seen):
        raise ConfigError(
            f"run_dir '{run_dir}' of process 0 is not that of process {seen.index(False)}; use storage that all share"
        )


def write_file(path: Path, text: str) -> None:
    """Writes or replaces a small file, which is complete at any time. Raises ConfigError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise _not_written(path.parent, error) from None


def _not_written(run_dir: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"run_dir '{run_dir}' cannot be written ({error.strerror}); make room, then start again"
    )


def model_path(run_dir: Path) -> Path:
    """Returns where the trained model is exported."""
    return run_dir / "model"


def mark_export(run_dir: Path, config: TrainConfig, epochs: int | None, *, complete: bool) -> None:
    """Notes that the model of `config` is about to be written to run_dir/model, or is there; by the main process.

    Args:
        epochs: those that gave `config` its steps, if any did.
        complete: whether the model is there.
    """
    if processes.is_main_process():
        mark = {
            "step": config.steps,
            "epochs": epochs,
            "dtype": config.export_dtype,
            "complete": complete,
        }
        write_file(run_dir / _EXPORT, json.dumps(mark) + "\n")


def finished_step(run_dir: Path, config: TrainConfig, latest: int | None) -> int | None:
    """Returns the step of run_dir/model if that is what this run has to end with, else None.

    Args:
        latest: the step of the newest checkpoint, None if there is none.

    Raises:
        ConfigError: a model that this run did not write, or the one of an earlier end from which it cannot go on.
    """
    exists, mark = processes.broadcast(lambda: (model_path(run_dir).exists(), _read_mark(run_dir)))
    if not exists:
        return None
    if mark is None:
        raise ConfigError(
            f"{model_path(run_dir)} is there and this run has not written it; move it away, or use another run_dir"
        )
    same_end = (
        mark["step"] == config.steps
        if config.steps is not None
        else mark["epochs"] == config.epochs
    )
    if mark["complete"] and same_end and mark["dtype"] == config.export_dtype:
        return mark["step"]
    if latest is None:
        raise ConfigError(
            f"{model_path(run_dir)} is of step {mark['step']} in {mark['dtype']}, and no checkpoint is left to go on "
            f"from; use a new run_dir, with model.init_from {model_path(run_dir)}"
        )
    return None


def _read_mark(run_dir: Path) -> dict[str, Any] | None:
    try:
        return json.loads((run_dir / _EXPORT).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        # A power cut can empty it. The model is this run's all the same, and written again.
        return {"step": None, "epochs": None, "dtype": None, "complete": False}

"""The model of a run's best evaluation, kept as a directory of its own."""

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdar_jax.devices import processes
from sdar_jax.errors import CheckpointError, ConfigError
from sdar_jax.evaluation.config import is_likelihood
from sdar_jax.model import Model
from sdar_jax.training.extensions import Callback

log = logging.getLogger(__name__)

Export = Callable[[Model, Path], None]


def best_path(run_dir: Path) -> Path:
    """The directory of the best model; best.json beside it says of which step it is."""
    return run_dir / "best"


def keep_best(
    name: str, run_dir: Path, export: Export, *, counts: Callable[[int], bool] = lambda step: True
) -> Callback:
    """Makes a callback that exports the model of each evaluation that is better than all before, also those of
    earlier starts.

    Args:
        name: of the number: of a likelihood less is better, of others more.
        export: (model, directory) writes it.
        counts: of a step, whether its evaluation may be the best: bounds of other blocks are no better or worse.

    Raises:
        CheckpointError: best.json of an earlier start cannot be read.
    """
    record = run_dir / "best.json"
    best = processes.broadcast(lambda: _read(record, name, counts))

    def keep(step: int, line: dict[str, Any], model: Callable[[], Model]) -> None:
        nonlocal best
        if not any(key.startswith("eval_") for key in line) or not counts(step):
            return
        if f"eval_{name}" not in line:
            numbers = ", ".join(
                key.removeprefix("eval_") for key in line if key.startswith("eval_")
            )
            raise ConfigError(
                f"eval.best is {name!r}, and the evaluation gives {numbers}; choose one of these"
            )
        value = line[f"eval_{name}"]
        # What is not a number is never better.
        if math.isfinite(value) and (
            best is None or (value < best if is_likelihood(name) else value > best)
        ):
            export(model(), best_path(run_dir))
            best = value
            if processes.is_main_process():
                _write(record, {"name": name, "value": value, "step": step})
            log.info(
                "step %d has the best %s so far, %.4g: its model is in %s",
                step,
                name,
                value,
                best_path(run_dir),
            )

    return keep


def _read(record: Path, name: str, counts: Callable[[int], bool]) -> float | None:
    if not record.exists():
        return None
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        # By another number, or with the blocks of now, nothing is known yet.
        same = found["name"] == name and counts(int(found["step"]))
        return float(found["value"]) if same else None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{record}: cannot be read ({error}); remove it, and the best starts anew"
        ) from None


def _write(record: Path, values: dict[str, Any]) -> None:
    temporary = record.with_name(f".{record.name}.new")
    temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")
    os.replace(temporary, record)

"""Likelihood and accuracy of models: `held_out` scores them while they are trained, `evaluate` on benchmarks."""

import importlib
from typing import TYPE_CHECKING, Any

from sdar_jax.evaluation.likelihood import autoregressive_nll, nelbo

if TYPE_CHECKING:
    from sdar_jax.evaluation.benchmarks import Result, evaluate
    from sdar_jax.evaluation.tasks import TASKS, Problem, Task

__all__ = ["TASKS", "Problem", "Result", "Task", "autoregressive_nll", "evaluate", "nelbo"]

# Where each name is imported from when it is first used: training needs none of them.
_HOMES = {
    "TASKS": "tasks",
    "Problem": "tasks",
    "Result": "benchmarks",
    "Task": "tasks",
    "evaluate": "benchmarks",
}


def __getattr__(name: str) -> Any:
    """Returns one of these names on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value

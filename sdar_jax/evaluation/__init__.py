"""Likelihood and accuracy of models: `held_out` scores them while they are trained, `evaluate` on benchmarks."""

from typing import TYPE_CHECKING

from sdar_jax.evaluation.likelihood import autoregressive_nll, nelbo
from sdar_jax.lazy import importer

if TYPE_CHECKING:
    from sdar_jax.evaluation.benchmarks import Result, evaluate
    from sdar_jax.evaluation.tasks import TASKS, Problem, Task

__all__ = ["TASKS", "Problem", "Result", "Task", "autoregressive_nll", "evaluate", "nelbo"]

# Where each name is imported from when it is first used: training needs none of them.
__getattr__ = importer(
    __name__,
    {
        "TASKS": "tasks",
        "Problem": "tasks",
        "Result": "benchmarks",
        "Task": "tasks",
        "evaluate": "benchmarks",
    },
)

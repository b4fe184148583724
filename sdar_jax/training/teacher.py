"""The teacher of a run that distils (`distillation`): the model as training starts from it.

What is frozen anyway, as the base of low-rank matrices, is held once. Of weights that are trained, copies are frozen
too, as "teacher.NAME": saved once with the others, read by every step, and no part of the exported model.
"""

from typing import Any

from sdar_jax.adapters.lora import is_low_rank
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import ObjectiveConfig
from sdar_jax.paradigm import Paradigm
from sdar_jax.training.optimizer import Weights
from sdar_jax.training.step import Rebuild

_PREFIX = "teacher."


def teacher_paradigm(config: ObjectiveConfig, start: ModelConfig) -> Paradigm | None:
    """Returns how the teacher reads; None without one.

    Args:
        start: the model that training starts from, before it is converted.
    """
    return None if config.distill is None else start.paradigm


def teacher_copies(trained: dict[str, Any]) -> dict[str, Any]:
    """Names those of the trained weights (or their shapes) that the teacher has too: all but low-rank matrices."""
    return {_PREFIX + name: weight for name, weight in trained.items() if not is_low_rank(name)}


def rebuild_teacher(rebuild: Rebuild) -> Rebuild:
    """Makes what builds the teacher of a step's frozen weights.

    Args:
        rebuild: weights by name -> the model without low-rank matrices.
    """

    def of_frozen(frozen: Weights) -> Any:
        shared = {name.replace(".base", ""): weight for name, weight in frozen.items()}
        own = {
            name.removeprefix(_PREFIX): weight
            for name, weight in frozen.items()
            if name.startswith(_PREFIX)
        }
        return rebuild({**shared, **own})

    return of_frozen

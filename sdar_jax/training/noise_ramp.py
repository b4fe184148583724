"""The range of noise levels over a run: a curriculum, as data of a step."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike

from sdar_jax.corruption import NoiseRange
from sdar_jax.training.config import TrainConfig, whole_steps

NoiseSchedule = Callable[[ArrayLike], NoiseRange]


def noise_schedule(config: TrainConfig) -> NoiseSchedule | None:
    """Makes the schedule of [t_min, t_max], for steps counted from 1; None where the range does not move.

    With n steps of ramp, step i has share min((i - 1) / (n - 1), 1) of the way from the range of
    `objective.corruption` to that of `noise_ramp`: all of it from step n on. d3LLM's (arXiv 2601.07568) is
    t_min from 0 to 0.8 and t_max 0.8.
    """
    if not config.noise_ramp.moves:
        return None
    amount, steps = config.noise_ramp.steps, config.total_steps
    last = steps if amount is None else whole_steps(amount, steps)
    ends = tuple(zip(config.objective.corruption.range, config.final_corruption.range, strict=True))

    def noise_range(step: ArrayLike) -> NoiseRange:
        share = jnp.clip((jnp.asarray(step) - 1) / max(last - 1, 1), 0, 1)
        low, high = (first + share * (final - first) for first, final in ends)
        return low, high

    return noise_range

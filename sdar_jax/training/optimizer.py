"""AdamW and the learning rate over a run, from optax's parts."""

import optax
from jaxtyping import Array

from sdar_jax.training.config import OptimizerConfig, whole_steps

Weights = dict[str, Array]


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Makes the schedule of the learning rate, for steps counted from 1 to `steps`.

    With w warm-up steps, step i <= w has i / w of the highest rate. Then "constant"; "cosine", which ends at
    `final_fraction` of it in the last step; or "wsd": constant, and in the last `decay` steps linearly down to there.
    """
    high = config.learning_rate
    low = config.learning_rate * config.final_fraction
    warmup = whole_steps(config.warmup, steps)
    after = steps - warmup
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(high, max(after, 1), alpha=config.final_fraction)
    elif config.schedule == "wsd":
        decay = whole_steps(config.decay, steps)
        main = optax.linear_schedule(high, low, decay, transition_begin=after - decay)
    else:
        main = optax.constant_schedule(high)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, high, warmup), main], [warmup])


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Makes clipping, Adam and weight decay, without the learning rate: an update is minus the rate times what this
    gives.

    The rate is left to the step, so that it follows the run's count even where an update was left out.
    """
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    return optax.chain(clip, adam, optax.add_decayed_weights(config.weight_decay, is_decayed))


def is_decayed(weights: Weights) -> dict[str, bool]:
    """Returns whether each weight, by its name, decays: all but norms and biases."""
    return {name: not name.endswith(("norm", "bias")) for name in weights}

"""One optimiser step as a pure function of (state, batch), whatever the objective."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from sdar_jax import sharding
from sdar_jax.chips import platform
from sdar_jax.config import ModelConfig
from sdar_jax.model import Model
from sdar_jax.objectives import Batch, Example, LossMetrics, make_example, training_loss
from sdar_jax.training.config import TrainConfig
from sdar_jax.training.flops import Work, work
from sdar_jax.training.optimizer import Weights, adamw, learning_rate


class TrainState(NamedTuple):
    """All that a step changes; one pytree, donated to the step and saved whole.

    weights, ema: by name (see `model_weights`); ema None without. optimizer: of optax. key: uint32, the data of the
    run's random key. step: int32, steps taken.
    """

    weights: Weights
    optimizer: optax.OptState
    ema: Weights | None
    key: Array
    step: Int[Array, ""]


class StepMetrics(NamedTuple):
    """Sums over the step's batch, but for the last three. Float32, and `finite`: whether the update was applied."""

    loss: Float[Array, ""]
    count: Float[Array, ""]
    scores: LossMetrics
    work: Work
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]


Rebuild = Callable[[Weights], Model]
Step = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def model_weights(model: Model) -> tuple[dict[str, Any], Rebuild]:
    """The weights of a model (or their shapes) by name, such as "layers.body.qkv", and what puts them back."""
    leaves, structure = jax.tree.flatten_with_path(model)
    names = [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in leaves]

    def rebuild(weights: Weights) -> Model:
        return jax.tree.unflatten(structure, [weights[name] for name in names])

    return dict(zip(names, (leaf for _, leaf in leaves), strict=True)), rebuild


def initial_state(config: TrainConfig, weights: Weights, key: jax.Array) -> TrainState:
    """The state before the first step; the moving average starts at the weights."""
    ema = None if config.ema_decay is None else jax.tree.map(jnp.copy, weights)
    return TrainState(weights, adamw(config.optimizer).init(weights), ema, jax.random.key_data(key), jnp.int32(0))


def make_step(config: TrainConfig, model: ModelConfig, rebuild: Rebuild) -> Step:
    """The jitted step, on the mesh in force where it is called. The batch is the whole one; the state is donated.

    The corruption is drawn for the whole batch, which is then split into micro-batches, two views of a row together;
    gradients of the weighted sum add up in float32 and are divided once by the sum of counts. So `micro_batch_size`
    changes nothing but memory, and rounding; and a mixture's router losses, which are of each micro-batch.

    Where loss or gradient is not finite (`StepMetrics.finite` is False), or nothing is learned (count 0), weights,
    optimiser and average stay as they were and only `step` advances.
    """
    optimizer, rate = adamw(config.optimizer), learning_rate(config.optimizer, config.total_steps)
    options = {"remat": config.remat, "compute_dtype": compute_dtype(config)}
    batch_size = config.data.batch_size
    parts = batch_size // (config.micro_batch_size or batch_size)

    def loss(weights: Weights, example: Example):
        return training_loss(rebuild(weights), example, config.objective, **options)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        example = make_example(batch, key, config.objective, model)
        gradients, total, scores = _accumulate(loss, state.weights, example, parts)
        count = example.count.sum()
        gradients = jax.tree.map(lambda g: g / jnp.where(count > 0, count, 1).astype(g.dtype), gradients)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(total)
        lr = jnp.asarray(rate(state.step + 1))
        updated = _update(state, gradients, lr, optimizer, config.ema_decay)
        state = jax.tree.map(partial(jnp.where, finite & (count > 0)), updated, state)
        measured = StepMetrics(total, count, scores, work(example), norm, lr, finite)
        return sharding.constrain_weights(state._replace(step=state.step + 1)), measured

    return jax.jit(step, donate_argnums=0)


def compute_dtype(config: TrainConfig) -> jnp.dtype | None:
    """What "auto" means on the default device; None is the weights' own."""
    if config.compute_dtype == "auto":
        return None if platform() == "cpu" else jnp.dtype(jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)


def _accumulate(loss: Callable, weights: Weights, example: Example, parts: int):
    """Gradients, loss and scores of the weighted sum, added up over equal slices of the rows."""
    slices = jax.tree.map(lambda x: _sliced(x, parts), example)
    compute = jax.value_and_grad(loss, has_aux=True)

    def add(sums, part: Example):
        (total, scores), gradients = compute(weights, part)
        return jax.tree.map(jnp.add, sums, (gradients, total, scores)), None

    shapes = jax.eval_shape(lambda part: compute(weights, part), jax.tree.map(lambda x: x[0], slices))
    (total, scores), gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, (sharding.constrain_weights(gradients), total, scores), slices)[0]


def _sliced(x: Array, parts: int) -> Array:
    """[B, ...] -> [parts, B / parts, ...]: of the rows of each device an equal share in every slice."""
    devices = sharding.parts("batch", x.shape[0] // parts)
    slices = x.reshape(devices, parts, -1, *x.shape[1:]).swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])
    return sharding.constrain(slices, None, "batch")


def _update(state: TrainState, gradients: Weights, lr: Array, optimizer, ema_decay: float | None) -> TrainState:
    directions, moments = optimizer.update(gradients, state.optimizer, state.weights)
    weights = jax.tree.map(lambda w, d: w - (lr * d).astype(w.dtype), state.weights, directions)
    ema = state.ema
    if ema is not None and ema_decay is not None:
        ema = optax.incremental_update(weights, ema, 1 - ema_decay)
    return state._replace(weights=weights, optimizer=moments, ema=ema)

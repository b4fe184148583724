"""One optimiser step as a pure function of (state, batch), whatever is learned."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from sdar_jax.devices import sharding
from sdar_jax.devices.chips import platform
from sdar_jax.loss_metrics import LossMetrics, StepTotals
from sdar_jax.model import Model
from sdar_jax.model.axes import constrain_weights
from sdar_jax.objectives import Batch, LossInputs
from sdar_jax.training.flops import TokenCounts, count_tokens
from sdar_jax.training.noise_ramp import NoiseSchedule
from sdar_jax.training.optimizer import Weights


class TrainState(NamedTuple):
    """All that a step changes; one pytree, donated to the step and saved in full.

    Attributes:
        weights: those that are trained, by name (see `model_weights`).
        optimizer: the state of optax.
        ema: the moving average of `weights`; None if none is kept.
        key: uint32, the data of the run's random key.
        step: int32, steps taken.
    """

    weights: Weights
    optimizer: optax.OptState
    ema: Weights | None
    key: Array
    step: Int[Array, ""]


class StepMetrics(NamedTuple):
    """Sums over the step's batch, but for the last three. Float32 scalars.

    Attributes:
        loss: weighted; divided by `normalizer` it is the objective.
        normalizer: N of the batch.
        scores: unweighted sums.
        token_counts: what the network was given to compute.
        grad_norm: before clipping.
        learning_rate: of this step.
        finite: bool, whether loss and gradient were, and so whether the update was applied.
    """

    loss: Float[Array, ""]
    normalizer: Float[Array, ""]
    scores: LossMetrics
    token_counts: TokenCounts
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    finite: Bool[Array, ""]


Rebuild = Callable[[Weights], Model]
MakeInputs = Callable[..., LossInputs]
Loss = Callable[..., tuple[Float[Array, ""], LossMetrics]]
CountCorrect = Callable[[Model, LossInputs], Int[Array, ""]]


def model_weights(model: Model) -> tuple[dict[str, Any], Rebuild]:
    """Splits a model into its weights (or their shapes) by name, such as "layers.body.qkv", and what puts them back.

    Those of a weight with low-rank matrices are "layers.body.qkv.base", "layers.body.qkv.lora_a.q_proj" and so on.
    """
    leaves, structure = jax.tree.flatten_with_path(model)
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".").replace(".value", "")
        for path, _ in leaves
    ]

    def rebuild(weights: Weights) -> Model:
        return jax.tree.unflatten(structure, [weights[name] for name in names])

    return dict(zip(names, (leaf for _, leaf in leaves), strict=True)), rebuild


def with_block_size(rebuild: Rebuild, block_size: int) -> Rebuild:
    """Makes what puts weights back into a model of another block size."""

    def rebuilt(weights: Weights) -> Model:
        model = rebuild(weights)
        model.config = dataclasses.replace(model.config, block_size=block_size)
        return model

    return rebuilt


def initial_state(
    optimizer: optax.GradientTransformation, weights: Weights, key: jax.Array, *, averaged: bool
) -> TrainState:
    """Makes the state before the first step; the moving average, if one is kept, starts at the weights."""
    ema = jax.tree.map(jnp.copy, weights) if averaged else None
    return TrainState(weights, optimizer.init(weights), ema, jax.random.key_data(key), jnp.int32(0))


def make_step(
    make_inputs: MakeInputs,
    loss: Loss,
    rebuild: Rebuild,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    *,
    teacher: Rebuild | None = None,
    count_correct: CountCorrect | None = None,
    noise_schedule: NoiseSchedule | None = None,
    micro_batches: int = 1,
    ema_decay: float | None = None,
) -> jax.stages.Wrapped:
    """Makes the jitted step (state, batch, frozen={}) -> (state, StepMetrics), on the mesh in force when it is called.

    The batch is the global one. The state is donated; `frozen`, the weights that are not trained, is only read.

    The inputs are made of the global batch and then split into micro-batches, two views of a row together; gradients
    of the weighted sum add up in float32 and are divided once by the sum of normalizers. So `micro_batches` changes
    nothing but memory, and rounding; and an MoE's router losses, which are of each micro-batch.

    Where loss or gradient is not finite (`StepMetrics.finite` is False), or no token has loss (normalizer 0), weights,
    optimiser and average stay as they were and only `step` advances.

    Args:
        make_inputs: (batch, key) -> what the network reads and predicts; the key differs from step to step. With
            `noise_schedule`, (batch, key, noise_range=...).
        loss: (model, inputs) -> the weighted sum, which is divided by the sum of `inputs.normalizer`, and its metrics.
            With `count_correct`, of one micro-batch of several, (model, inputs, totals=StepTotals(...)).
        rebuild: weights by name, frozen ones included -> the model.
        optimizer: gives a direction, which is scaled by the learning rate here.
        teacher: frozen weights by name -> the model that the loss is given as `teacher`; None: it is given none.
        learning_rate: of each step, counted from 1.
        count_correct: for a loss that is a mean over right guesses too: their number in a micro-batch, which takes one
            more forward of each where there are several. None: the loss does not ask.
        noise_schedule: the range of noise levels of each step, counted from 1; None where that is always the same.
        micro_batches: equal parts of the batch that are computed one after the other.
        ema_decay: of the moving average; None where the state has none.
    """

    def step(
        state: TrainState,
        batch: Batch,
        frozen: Weights = {},  # noqa: B006 (never changed)
    ) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        moving = {} if noise_schedule is None else {"noise_range": noise_schedule(state.step + 1)}
        inputs = make_inputs(batch, key, **moving)

        normalizer = inputs.normalizer.sum()
        parts = jax.tree.map(lambda x: _sliced(x, micro_batches), inputs)
        known: dict[str, Any] = {} if teacher is None else {"teacher": teacher(frozen)}
        if count_correct is not None and micro_batches > 1:
            model = rebuild({**frozen, **state.weights})
            counts = jax.lax.map(partial(count_correct, model), parts)
            known["totals"] = StepTotals(normalizer, counts.sum())

        def loss_of_weights(weights: Weights, part: LossInputs) -> tuple[Array, LossMetrics]:
            return loss(rebuild({**frozen, **weights}), part, **known)

        gradients, total, scores = _accumulate(loss_of_weights, state.weights, parts)

        def mean(gradient: Array) -> Array:
            return gradient / jnp.where(normalizer > 0, normalizer, 1).astype(gradient.dtype)

        gradients = jax.tree.map(mean, gradients)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(total)
        lr = jnp.asarray(learning_rate(state.step + 1))
        updated = _update(state, gradients, lr, optimizer, ema_decay)
        state = jax.tree.map(partial(jnp.where, finite & (normalizer > 0)), updated, state)
        state = constrain_weights(state._replace(step=state.step + 1))
        return state, StepMetrics(total, normalizer, scores, count_tokens(inputs), norm, lr, finite)

    return jax.jit(step, donate_argnums=0)


def compute_dtype(name: Literal["auto", "float32", "bfloat16"]) -> jnp.dtype | None:
    """Resolves the name of a dtype, "auto" by the default device; None is the weights' own."""
    if name == "auto":
        return None if platform() == "cpu" else jnp.dtype(jnp.bfloat16)
    return jnp.dtype(name)


def _accumulate(loss: Callable, weights: Weights, slices: LossInputs):
    """Adds up gradients, loss and scores of the weighted sum over equal slices of the rows, [parts, rows, ...]."""
    compute = jax.value_and_grad(loss, has_aux=True)

    def add(sums, part: LossInputs):
        (total, scores), gradients = compute(weights, part)
        return jax.tree.map(jnp.add, sums, (gradients, total, scores)), None

    # Only the shapes are needed: the sums start at zero.
    shapes = jax.eval_shape(
        lambda part: compute(weights, part), jax.tree.map(lambda x: x[0], slices)
    )
    (total, scores), gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, _ = jax.lax.scan(add, (constrain_weights(gradients), total, scores), slices)
    return sums


def _sliced(x: Array, parts: int) -> Array:
    """Splits [B, ...] into [parts, B / parts, ...], with an equal share of each device's rows in every slice."""
    devices = sharding.num_shards("batch", x.shape[0] // parts)
    by_device = x.reshape(devices, parts, -1, *x.shape[1:])
    slices = by_device.swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])
    return sharding.constrain(slices, None, "batch")


def _update(
    state: TrainState, gradients: Weights, lr: Array, optimizer, ema_decay: float | None
) -> TrainState:
    directions, moments = optimizer.update(gradients, state.optimizer, state.weights)
    weights = jax.tree.map(lambda w, d: w - (lr * d).astype(w.dtype), state.weights, directions)
    ema = state.ema
    if ema is not None and ema_decay is not None:
        ema = optax.incremental_update(weights, ema, 1 - ema_decay)
    return state._replace(weights=weights, optimizer=moments, ema=ema)

"""A step against a plain one, and what must not change it: micro-batches, nothing to learn, bad numbers."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdar_jax.corruption import CorruptionConfig
from sdar_jax.data import DataConfig
from sdar_jax.experts import balance_loss, max_load, z_loss
from sdar_jax.model import Model, stack_layers
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import Batch, ObjectiveConfig, make_inputs
from sdar_jax.training.config import InitConfig, OptimizerConfig, TrainConfig
from sdar_jax.training.optimizer import adamw, is_decayed, learning_rate
from sdar_jax.training.setup import configured_step
from sdar_jax.training.step import initial_state, make_step, model_weights
from sdar_jax.weighted_loss import training_loss, weighted_loss
from tests.tiny import tiny_llada2

SHAPE = ModelConfig(32, 16, 32, 1, 2, 1, 8, block_size=4, mask_token_id=31)
OBJECTIVES = ("autoregressive", "masked_diffusion", "block_diffusion")
ROWS, LENGTH = 8, 16


def shape(objective: str) -> ModelConfig:
    return dataclasses.replace(SHAPE, objective=objective)


OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup=0, clip_norm=0.1)
RATE = learning_rate(OPTIMIZER, 100)
PLAIN = ObjectiveConfig()


def complementary(wanted: bool = True) -> ObjectiveConfig:
    return ObjectiveConfig(CorruptionConfig(complementary=wanted))


def random_batch(noisy: bool = False) -> Batch:
    """Packed rows: two documents and padding, prompts without loss, one row with nothing to learn."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 30, (ROWS, LENGTH))
    segments = np.where(np.arange(LENGTH) < 7, 1, 2) * np.ones((ROWS, 1), int)
    segments[1::2, 13:] = 0
    mask = draw.random((ROWS, LENGTH)) < 0.7
    mask[3] = False
    index = np.pad(np.arange(LENGTH - 5), (0, 1), constant_values=-1) * np.ones((ROWS, 1), int)
    arrays = (jnp.asarray(x, jnp.int32) for x in (tokens, segments))
    return Batch(*arrays, jnp.asarray(mask), jnp.asarray(index, jnp.int32) if noisy else None)


def nothing_to_learn(batch: Batch) -> Batch:
    return batch._replace(loss_mask=jnp.zeros((ROWS, LENGTH), bool))


def fresh(
    model: ModelConfig,
    objective: ObjectiveConfig = PLAIN,
    dtype=jnp.float32,
    *,
    micro=ROWS,
    ema_decay=None,
):
    """State and step of a model with random weights; `micro` rows are computed at once."""
    weights, rebuild = model_weights(stack_layers(Model(model, jax.random.key(0), dtype)))
    step = make_step(
        lambda batch, key: make_inputs(batch, key, objective, model),
        partial(training_loss, config=objective),
        rebuild,
        adamw(OPTIMIZER),
        RATE,
        micro_batches=ROWS // micro,
        ema_decay=ema_decay,
    )
    return initial_state(
        adamw(OPTIMIZER), weights, jax.random.key(1), averaged=ema_decay is not None
    ), step


def host(tree):
    return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def largest_difference(a, b) -> float:
    return max(
        float(np.max(np.abs(x - y), initial=0))
        for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


@pytest.mark.xla_defaults
@pytest.mark.parametrize(
    ("objective", "views", "micro"),
    [("autoregressive", False, 4), ("masked_diffusion", False, 2), ("block_diffusion", True, 2)],
)
def test_micro_batches_make_the_plain_step_of_the_whole_batch(objective, views, micro, x64):
    """Two steps, against the whole batch at once, its loss divided by its count, and optax's AdamW.

    Rows have unequal weight, so dividing each micro-batch by its own count would show. A third batch has nothing to
    learn, and changes nothing but the count of steps.
    """
    config, model = complementary(views), shape(objective)
    batch = random_batch(noisy=objective == "block_diffusion")
    state, step = fresh(model, config, jnp.float64, micro=micro, ema_decay=0.75)
    weights, rebuild = model_weights(stack_layers(Model(model, jax.random.key(0), jnp.float64)))
    o = OPTIMIZER
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.1),
        optax.adamw(
            lambda n: RATE(n + 1),
            o.beta1,
            o.beta2,
            o.eps,
            weight_decay=o.weight_decay,
            mask=is_decayed,
        ),
    )
    moments, average = optimizer.init(weights), weights

    @jax.jit
    def loss_and_gradient(weights, number):
        key = jax.random.fold_in(jax.random.key(1), number)
        inputs = make_inputs(batch, key, config, model)
        loss = lambda weights: weighted_loss(rebuild(weights), inputs)[0] / inputs.normalizer.sum()
        return jax.value_and_grad(loss)(weights)

    for number in range(2):
        state, metrics = step(state, batch)
        value, gradients = loss_and_gradient(weights, number)
        updates, moments = optimizer.update(gradients, moments, weights)
        weights = optax.apply_updates(weights, updates)
        average = jax.tree.map(lambda a, w: 0.75 * a + 0.25 * w, average, weights)
        norm = optax.tree.norm(gradients)
        assert norm > 0.1, "clipping must be at work"
        assert abs(metrics.loss / metrics.normalizer - value) < 1e-12 * value
        assert abs(metrics.grad_norm - norm) < 1e-12 * norm
    assert largest_difference(state.weights, weights) < 1e-12
    assert largest_difference(state.ema, average) < 1e-12
    before = host(state)
    state, metrics = step(state, nothing_to_learn(batch))
    assert metrics.finite and metrics.normalizer == 0 and metrics.grad_norm == 0
    assert largest_difference(state._replace(step=0), before._replace(step=0)) == 0
    assert state.step == 3


@pytest.mark.slow
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_accumulation_changes_nothing(objective, views, x64):
    """Every split of the batch, with layers that are scanned."""
    results = []
    model = dataclasses.replace(shape(objective), num_layers=3)
    for micro in (ROWS, 4, 1):
        state, step = fresh(model, complementary(views), jnp.float64, micro=micro)
        state, metrics = step(state, random_batch())
        results.append(host((state.weights, state.optimizer, metrics)))
    norm = results[0][2].grad_norm
    for other in results[1:]:
        assert largest_difference(results[0][:2], other[:2]) < 1e-12
        assert abs(norm - other[2].grad_norm) < 1e-12 * norm
        assert results[0][2].scores.num_loss_tokens == other[2].scores.num_loss_tokens


def test_an_moe_s_losses_are_the_mean_of_its_micro_batches(x64):
    """Weighted by count, each with the statistics of its own tokens, and reported beside the loss they are part of."""
    experts = {
        "num_experts": 4,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 8,
        "initializer_range": 0.5,
    }
    model = dataclasses.replace(
        SHAPE, architecture="qwen3_moe", objective="autoregressive", **experts
    )
    config = ObjectiveConfig(router_balance=0.5, router_z=0.25)
    weights, rebuild = model_weights(stack_layers(Model(model, jax.random.key(0), jnp.float64)))

    @jax.jit
    def expected(weights):
        inputs = make_inputs(random_batch(), jax.random.key(0), config, model)
        total, routers = 0.0, 0.0
        for part in (slice(0, 4), slice(4, 8)):
            own = jax.tree.map(lambda x, part=part: x[part], inputs)
            _, sums = rebuild(weights).hidden_and_routing(own.tokens, own.positions, own.ranges)
            router = (
                jnp.stack([balance_loss(sums), z_loss(sums), max_load(sums)]) * own.normalizer.sum()
            )
            total += weighted_loss(rebuild(weights), own)[0] + 0.5 * router[0] + 0.25 * router[1]
            routers += router
        return total / inputs.normalizer.sum(), routers

    (value, routers), gradients = jax.value_and_grad(expected, has_aux=True)(weights)
    state, step = fresh(model, config, jnp.float64, micro=4)
    _, metrics = step(state, random_batch())
    assert abs(metrics.loss / metrics.normalizer - value) < 1e-12 * value
    assert abs(metrics.grad_norm - optax.tree.norm(gradients)) < 1e-9
    np.testing.assert_allclose(jnp.stack(metrics.scores.router), routers, rtol=1e-6)


@pytest.mark.parametrize("micro", [ROWS, 2])
def test_confidence_is_a_mean_over_the_right_guesses_of_a_step(micro, x64):
    """Against all logits of the batch at once. Micro-batches have unequal numbers of right guesses."""
    model = shape("block_diffusion")
    config = ObjectiveConfig(CorruptionConfig(complementary=True), confidence_beta=0.5)
    batch = random_batch(noisy=True)
    batch = batch._replace(tokens=batch.tokens % 4)
    weights, rebuild = model_weights(stack_layers(Model(model, jax.random.key(0), jnp.float64)))
    # Four tokens of large logits: a fourth of the guesses is right.
    weights["head"] = weights["head"].at[:4].multiply(40)
    inputs = make_inputs(batch, jax.random.fold_in(jax.random.key(1), 0), config, model)

    @jax.jit
    def expected(weights):
        net = rebuild(weights)
        outputs = inputs.targets.shape[1]
        hidden = net.hidden(inputs.tokens, inputs.positions, inputs.ranges, outputs=outputs)
        log_probs = jax.nn.log_softmax(hidden @ net.output_weights().T)
        nll = -jnp.take_along_axis(log_probs, inputs.targets[..., None], axis=-1)[..., 0]
        right = (log_probs.argmax(-1) == inputs.targets) & (inputs.weights != 0)
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
        loss = (inputs.weights * nll).sum() / inputs.normalizer.sum()
        mean = jnp.where(right, entropy, 0).sum() / right.sum()
        return loss + 0.5 * mean, (mean, right)

    (value, (mean, right)), gradients = jax.value_and_grad(expected, has_aux=True)(weights)
    assert len(set(right.reshape(4, -1).sum(1).tolist())) > 1 and mean > 0.1
    run = TrainConfig(
        "unused",
        100,
        InitConfig(shape=model, tokenizer="unused"),
        DataConfig((), sequence_length=LENGTH, batch_size=ROWS),
        objective=config,
        optimizer=OPTIMIZER,
        micro_batch_size=micro,
    )
    state = initial_state(adamw(OPTIMIZER), weights, jax.random.key(1), averaged=False)
    _, metrics = configured_step(run, model, rebuild)(state, batch)
    norm = optax.tree.norm(gradients)
    assert abs(metrics.loss / metrics.normalizer - value) < 1e-12 * value
    assert abs(metrics.grad_norm - norm) < 1e-12 * norm
    assert metrics.scores.correct == right.sum()
    np.testing.assert_allclose(metrics.scores.entropy / right.sum(), mean, rtol=1e-6)


@pytest.fixture(scope="module")
def diffusion_step():
    """Compiled once; a fresh state for each test."""
    model = shape("block_diffusion")
    step = fresh(model, ema_decay=0.9)[1]
    return lambda: (fresh(model, ema_decay=0.9)[0], step)


def test_noise_differs_from_step_to_step_and_not_from_run_to_run(diffusion_step):
    runs = []
    for _ in range(2):
        state, step = diffusion_step()
        asked = []
        for _ in range(3):
            state, metrics = step(state, random_batch())
            asked.append(float(metrics.scores.num_loss_tokens))
        runs.append(asked)
    assert runs[0] == runs[1] and len(set(runs[0])) > 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_is_never_applied(bad, diffusion_step):
    """A weight that makes loss or gradient NaN or Inf: state stays bit for bit, and the step says so."""
    state, step = diffusion_step()
    state, _ = step(state, random_batch())
    state.weights["final_norm"] = state.weights["final_norm"].at[0].set(bad)
    before = host(state)
    state, metrics = step(state, random_batch())
    assert not metrics.finite
    jax.tree.map(
        np.testing.assert_array_equal, host(state._replace(step=0)), before._replace(step=0)
    )


def test_the_state_is_donated(diffusion_step):
    state, step = diffusion_step()
    arrays = jax.tree.leaves((state.weights, state.optimizer, state.ema))
    step(state, random_batch())
    assert all(array.is_deleted() for array in arrays)


def test_frozen_weights_are_read_and_stay_the_caller_s():
    """The step is that of all weights, but for what it moves: the same loss, and moments of the trained ones alone."""
    model = shape("block_diffusion")
    weights, _rebuild = model_weights(stack_layers(Model(model, jax.random.key(0))))
    trained = {
        name: jnp.copy(weight) for name, weight in weights.items() if name.startswith("layers")
    }
    frozen = {name: weight for name, weight in weights.items() if name not in trained}
    state, step = fresh(model)
    _, expected = step(state, random_batch())
    state = initial_state(adamw(OPTIMIZER), trained, jax.random.key(1), averaged=False)
    state, metrics = step(state, random_batch(), frozen)
    assert metrics.loss == expected.loss and 0 < metrics.grad_norm < expected.grad_norm
    assert not any(weight.is_deleted() for weight in frozen.values())
    assert set(state.weights) == set(trained)
    assert largest_difference(state.weights, {name: weights[name] for name in trained}) > 0


def test_remat_and_compute_dtype_reach_the_model():
    batch, model = (
        random_batch(),
        dataclasses.replace(SHAPE, objective="block_diffusion", num_layers=2),
    )
    programs = {}
    for remat, dtype in [
        ("none", "auto"),
        ("dots", "auto"),
        ("full", "auto"),
        ("none", "bfloat16"),
        ("none", "float32"),
    ]:
        config = TrainConfig(
            "unused",
            100,
            InitConfig(shape=model, tokenizer="unused"),
            DataConfig((), sequence_length=LENGTH, batch_size=ROWS),
            optimizer=OPTIMIZER,
            remat=remat,
            compute_dtype=dtype,
        )
        step = configured_step(
            config, model, model_weights(stack_layers(Model(model, jax.random.key(0))))[1]
        )
        programs[remat, dtype] = step.lower(fresh(model)[0], batch).as_text()
    plain = programs["none", "auto"]
    dots = {name: text.count("dot_general") for name, text in programs.items()}
    assert dots["full", "auto"] > dots["none", "auto"]
    assert programs["dots", "auto"] not in (plain, programs["full", "auto"])
    assert "bf16" in programs["none", "bfloat16"] and "bf16" not in plain
    assert programs["none", "float32"] == plain


def test_biases_of_experts_are_held():
    """No gradient, and no decay: they only choose. All else is trained."""
    model = tiny_llada2(jnp.float32)
    weights, rebuild = model_weights(stack_layers(jax.tree.map(jnp.copy, model)))
    optimizer = dataclasses.replace(OPTIMIZER, weight_decay=0.5)
    objective = ObjectiveConfig(router_balance=0.1)
    step = make_step(
        lambda batch, key: make_inputs(batch, key, objective, model.config),
        partial(training_loss, config=objective),
        rebuild,
        adamw(optimizer),
        RATE,
        micro_batches=1,
        ema_decay=None,
    )
    before = jax.tree.map(np.asarray, weights)
    state = initial_state(adamw(optimizer), weights, jax.random.key(1), averaged=False)
    batch = random_batch()._replace(tokens=random_batch().tokens % 22)
    for _ in range(2):
        state, metrics = step(state, batch)
    assert metrics.finite and metrics.scores.router.balance > 0
    same = {name for name in before if np.array_equal(before[name], state.weights[name])}
    assert same == {"layers.body.expert_bias", "layers.last.expert_bias"}


def test_weights_have_names_and_go_back():
    model = stack_layers(Model(dataclasses.replace(SHAPE, num_layers=3), jax.random.key(0)))
    weights, rebuild = model_weights(model)
    assert {"embedding", "head", "final_norm", "layers.body.qkv", "layers.last.down"} <= set(
        weights
    )
    doubled = rebuild({name: 2 * weights[name] for name in reversed(list(weights))})
    assert jax.tree.structure(doubled) == jax.tree.structure(model)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), doubled, model)


def test_optimiser_and_average_are_float32_and_start_at_the_weights():
    weights, _ = model_weights(stack_layers(Model(SHAPE, jax.random.key(0))))
    state = initial_state(adamw(OPTIMIZER), weights, jax.random.key(1), averaged=True)
    jax.tree.map(np.testing.assert_array_equal, state.ema, weights)
    moments = [leaf.dtype for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert moments and set(moments) == {jnp.dtype(jnp.float32)}
    assert initial_state(adamw(OPTIMIZER), weights, jax.random.key(1), averaged=False).ema is None

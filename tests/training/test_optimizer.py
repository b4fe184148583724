"""The schedules by their definition, the update against optax's own AdamW."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdar_jax.model import Model, stack_layers
from sdar_jax.model.config import ModelConfig
from sdar_jax.training.config import OptimizerConfig, whole_steps
from sdar_jax.training.optimizer import adamw, is_decayed, learning_rate
from sdar_jax.training.step import model_weights

STEPS, PEAK = 40, 2e-3


def rates(**changes) -> np.ndarray:
    schedule = learning_rate(OptimizerConfig(learning_rate=PEAK, **changes), STEPS)
    return np.array([schedule(jnp.int32(step)) for step in range(1, STEPS + 1)]) / PEAK


def test_constant_after_a_linear_warm_up():
    expected = [min(step / 8, 1) for step in range(1, STEPS + 1)]
    np.testing.assert_allclose(rates(schedule="constant", warmup=8), expected, rtol=1e-6)


def test_without_warm_up_the_first_step_has_the_full_rate():
    np.testing.assert_allclose(rates(schedule="constant", warmup=0), np.ones(STEPS), rtol=1e-6)


def test_cosine_ends_where_it_is_told_to():
    share = np.clip((np.arange(1, STEPS + 1) - 8) / (STEPS - 8), 0, 1)
    cosine = 0.1 + 0.9 * (1 + np.cos(math.pi * share)) / 2
    expected = np.where(np.arange(1, STEPS + 1) <= 8, np.arange(1, STEPS + 1) / 8, cosine)
    np.testing.assert_allclose(
        rates(schedule="cosine", warmup=8, final_fraction=0.1), expected, rtol=1e-5
    )


def test_wsd_is_flat_and_then_falls_in_its_last_steps():
    steps = np.arange(1, STEPS + 1)
    falling = 1 - 0.75 * np.clip((steps - 30) / 10, 0, 1)
    expected = np.minimum(steps / 4, falling)
    np.testing.assert_allclose(
        rates(schedule="wsd", warmup=4, decay=10, final_fraction=0.25), expected, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("amount", "steps"), [(0.03, 2), (0.0, 0), (0.999, 40), (1, 1), (12, 12), (1.0, 1)]
)
def test_a_length_is_a_share_or_a_number_of_steps(amount, steps):
    assert whole_steps(amount, STEPS) == steps


def test_norms_and_biases_are_not_decayed():
    shape = {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "architecture": "llama"}
    config = ModelConfig(16, 8, 16, 3, 2, 1, 4, **shape)
    weights, _ = model_weights(stack_layers(Model(config, jax.random.key(0))))
    decayed = {name.rsplit(".")[-1] for name, does in is_decayed(weights).items() if does}
    kept = {name.rsplit(".")[-1] for name, does in is_decayed(weights).items() if not does}
    assert decayed == {"embedding", "head", "qkv", "output", "gate_up", "down"}
    assert kept == {
        *("final_norm", "attention_norm", "mlp_norm", "q_norm", "k_norm"),
        *("qkv_bias", "output_bias", "gate_up_bias", "down_bias"),
    }


def test_the_update_is_adamws():
    """Every field off its default, five steps, against optax.adamw behind optax's clipping."""
    config = OptimizerConfig(1e-2, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3, clip_norm=0.5)
    ours, schedule = adamw(config), learning_rate(config, 5)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(
            lambda count: schedule(count + 1), 0.8, 0.9, 1e-3, weight_decay=0.3, mask=is_decayed
        ),
    )
    mine = yours = {"qkv": jnp.arange(6.0), "final_norm": jnp.ones(3)}
    my_state, your_state = ours.init(mine), theirs.init(yours)
    for step in range(5):
        gradients = jax.tree.map(lambda w: jnp.sin(w * (step + 1)), mine)  # noqa: B023
        directions, my_state = ours.update(gradients, my_state, mine)
        mine = jax.tree.map(lambda w, d: w - schedule(step + 1) * d, mine, directions)  # noqa: B023
        updates, your_state = theirs.update(gradients, your_state, yours)
        yours = optax.apply_updates(yours, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mine, yours)


def test_clipping_can_be_off():
    config = OptimizerConfig(clip_norm=None, beta1=0.0, weight_decay=0.0)
    small, large = ({"w": jnp.array([scale, 2 * scale])} for scale in (1.0, 1e3))
    moments = [adamw(config).update(g, adamw(config).init(g), g)[1] for g in (small, large)]
    ratio = jax.tree.leaves(moments[1])[-1] / jax.tree.leaves(moments[0])[-1]
    np.testing.assert_allclose(ratio, 1e6, rtol=1e-5)

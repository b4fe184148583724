"""A curriculum of noise: the range of noise levels is the formula's at each step, as data of one compiled step."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax.errors import ConfigError
from sdar_jax.loss_metrics import LossMetrics
from sdar_jax.objectives import Batch, make_inputs
from sdar_jax.training import run
from sdar_jax.training.config import NoiseRampConfig
from sdar_jax.training.extensions import Extensions, TrainingObjective
from sdar_jax.training.noise_ramp import noise_schedule
from sdar_jax.training.optimizer import adamw, learning_rate
from sdar_jax.training.step import initial_state, make_step
from sdar_jax.training.tiny import tiny
from tests.bad_input import refused
from tests.tiny import tiny_model
from tests.training.conftest import assert_same_run, merged, metrics_of

# d3LLM's: t from [0, 0.8] to 0.8 alone.
CORRUPTION = {"mask": "exact", "level": "block", "t_max": 0.8}
RAMP = {"objective": {"corruption": CORRUPTION}, "noise_ramp": {"t_min": 0.8}}


@pytest.fixture
def ramped(make_config):
    return lambda **changes: make_config(**merged(RAMP, changes))


@pytest.mark.parametrize(
    ("ramp", "steps", "low", "high"),
    [
        ({}, 5, [0, 0.2, 0.4, 0.6, 0.8], [0.8] * 5),
        ({"steps": 3}, 5, [0, 0.4, 0.8, 0.8, 0.8], [0.8] * 5),
        ({"steps": 0.5}, 5, [0, 0.4, 0.8, 0.8, 0.8], [0.8] * 5),
        ({"t_min": 0.4, "t_max": 0.4}, 3, [0, 0.2, 0.4], [0.8, 0.6, 0.4]),
        ({"t_min": None, "t_max": 0.4, "steps": 1}, 3, [0] * 3, [0.8, 0.4, 0.4]),
        ({}, 1, [0], [0.8]),
    ],
)
def test_the_range_of_each_step(ramp, steps, low, high, ramped):
    config = ramped(noise_ramp=ramp, steps=steps, optimizer={"warmup": 0})
    schedule = noise_schedule(config)
    assert schedule is not None
    found = schedule(np.arange(1, steps + 1))
    np.testing.assert_allclose(found[0], low, atol=1e-6)
    np.testing.assert_allclose(jnp.broadcast_to(found[1], steps), high, atol=1e-6)
    assert noise_schedule(replace(config, noise_ramp=NoiseRampConfig())) is None


def test_a_step_draws_in_the_range_of_its_number_and_compiles_once(ramped):
    """Rows of one block of 20 tokens: how many are masked says t."""
    config = ramped(steps=5)
    model = tiny_model(jnp.float32, block_size=20)
    seen = []

    def inputs_of(batch, key, *, noise_range):
        inputs = make_inputs(batch, key, config.objective, model.config, noise_range=noise_range)
        masked = (inputs.weights != 0).sum(axis=1)
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), masked, ordered=True)
        return inputs

    def loss(weights, inputs):
        zero = jnp.float32(0)
        return (weights["w"] ** 2).sum(), LossMetrics(zero, zero, zero)

    step = make_step(
        inputs_of,
        loss,
        lambda weights: weights,
        adamw(config.optimizer),
        learning_rate(config.optimizer, 5),
        noise_schedule=noise_schedule(config),
    )
    tokens = jnp.ones((256, 20), jnp.int32)
    batch = Batch(tokens, tokens, tokens > 0)
    weights = {"w": jnp.ones(2)}
    state = initial_state(adamw(config.optimizer), weights, jax.random.key(0), averaged=False)
    for _ in range(5):
        state, _ = step(state, batch)
    jax.effects_barrier()
    assert step._cache_size() == 1 and len(seen) == 5
    for masked, low in zip(seen, (0, 0.2, 0.4, 0.6, 0.8), strict=True):
        assert masked.min() >= max(1, np.ceil(20 * low - 1e-3)) and masked.max() <= 16
        np.testing.assert_allclose(masked.mean() / 20, (low + 0.8) / 2 + 0.025 * (low < 0.8), atol=0.05)  # fmt: skip


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_goes_on_in_its_ramp(ramped, tmp_path):
    """Lines of metrics say where it is; stopped and resumed it is the run that was never stopped."""
    whole = ramped(run_dir=str(tmp_path / "whole"), log_every=1)
    assert run(whole).finished
    lows = [line["t_min"] for line in metrics_of(tmp_path / "whole") if "t_min" in line]
    np.testing.assert_allclose(lows, np.linspace(0, 0.8, 6), atol=1e-6)

    class Stop(Exception):
        pass

    def stop(step, line, model):
        if step == 3:
            raise Stop

    config = replace(whole, run_dir=str(tmp_path / "run"))
    with pytest.raises(Stop):
        run(config, Extensions(callbacks=(stop,)))
    with refused(ConfigError, "noise_ramp was", "its 2 steps would have had other noise; restore"):
        run(replace(config, noise_ramp=NoiseRampConfig(t_min=0.7)))
    with refused(ConfigError, "over 6 steps", "over 9"):
        longer = replace(config, steps=9, optimizer=replace(config.optimizer, schedule="constant"))
        run(longer)
    assert run(config).finished
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"noise_ramp": {"t_min": 0.9}}, "corruption range [0.9, 0.8] is not one"),
        ({"noise_ramp": {"t_max": 1.5}}, "corruption range [0.8, 1.5] is not one"),
        ({"noise_ramp": {"steps": 0}}, "noise_ramp.steps is 0.0; give a share of the steps in (0"),
        ({"noise_ramp": {"steps": 2.5}}, "noise_ramp.steps is 2.5; give a share"),
        ({"noise_ramp": {"t_min": None, "steps": 2}}, "noise_ramp.steps is 2.0 and nothing moves"),
        (
            {"objective": {"corruption": {"mask": "bernoulli", "t_min": 0.1}}, "noise_ramp": {"t_min": 0}},
            "corruption t_min is 0, so a weight 1 / t has no bound",
        ),
    ],
)  # fmt: skip
def test_ramps_that_cannot_be(changes, told, ramped):
    with refused(ConfigError, told):
        ramped(**changes)


def test_a_model_without_masks_has_no_noise(ramped):
    model = {"objective": "autoregressive", "block_size": None}
    with refused(ConfigError, "noise_ramp is given and the model autoregressive"):
        run(ramped(model=model))


def test_an_objective_of_ones_own_draws_its_own(ramped):
    objective = TrainingObjective(lambda batch, key, model: None)
    with refused(ConfigError, "noise_ramp is given and an objective of one's own"):
        run(ramped(), Extensions(objective=objective))


@pytest.mark.parametrize(("steps", "found"), [(3, 2), (6, 4), (0.5, 0.5), (None, None)])
def test_a_tiny_run_keeps_the_share(steps, found, ramped):
    assert tiny(ramped(noise_ramp={"steps": steps}, steps=6)).noise_ramp.steps == found

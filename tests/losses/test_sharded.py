"""The loss over a mesh of eight virtual CPU devices equals the loss on one, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sdar_jax.errors import ConfigError
from sdar_jax.losses import LossSharding, linear_cross_entropy
from tests.bad_input import refused

SCRIPT = """
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from sdar_jax.losses import LossSharding, Teacher, linear_cross_entropy

assert jax.device_count() == 8
jax.config.update("jax_enable_x64", True)
random = np.random.default_rng(0)
tokens, width, vocab = 48, 5, 12
hidden, head = random.normal(size=(tokens, width)), random.normal(size=(width, vocab))
targets = random.integers(0, vocab, tokens)
targets[::2] = (hidden @ head).argmax(-1)[::2]
# The first of the devices that split the tokens has none to predict, the others differ in how many.
weights = np.where(random.random(tokens) < 0.4, random.normal(size=tokens), 0)
weights[:12] = 0
# Of another width, and split as the student is.
wide = random.normal(size=(tokens, 8)), random.normal(size=(8, vocab))


def run(hidden, head, weights, vocab_axis, chunk, sharding=None, teacher=None):
    def scaled(hidden, head):
        total, scores = linear_cross_entropy(
            hidden, head, targets, weights, entropy_weight=jnp.float64(0.7), vocab_axis=vocab_axis,
            chunk=chunk, sharding=sharding, teacher=teacher, soft_loss="kl"
        )
        return 3 * total, (total, scores)

    return jax.value_and_grad(scaled, (0, 1), has_aux=True)(hidden, head)


jitted = jax.jit(run, static_argnums=(3, 4, 5))
for shape, token_axes, vocab_name in [
    ((4, 2), ("data",), "tensor"),
    ((2, 4), ("data",), "tensor"),
    ((1, 2, 4), ("data", "fsdp"), "tensor"),
    ((4, 2), ("data", "tensor"), None),
    ((1, 4), (), "tensor"),
]:
    names = ("data", "tensor") if len(shape) == 2 else ("data", "fsdp", "tensor")
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    sharding = LossSharding(mesh, token_axes, vocab_name)
    for vocab_axis in (0, 1):
        layout = head.T if vocab_axis == 0 else head
        spec = P(*((vocab_name, None) if vocab_axis == 0 else (None, vocab_name)))
        placed = jax.device_put(layout, NamedSharding(mesh, spec))
        ours = jitted(hidden, placed, weights, vocab_axis, 5, sharding)
        one = jitted(hidden, layout, weights, vocab_axis, 5)
        assert np.count_nonzero(one[0][1][1].entropy) > 5
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), ours, one)
        if vocab_name is not None and mesh.shape[vocab_name] > 1:
            assert ours[1][1].sharding.is_equivalent_to(NamedSharding(mesh, spec), 2), ours[1][1].sharding
            compiled = jitted.lower(hidden, placed, weights, vocab_axis, 5, sharding).compile()
            assert "all-gather" not in compiled.as_text()
        taught = Teacher(wide[0], wide[1].T if vocab_axis == 0 else wide[1])
        soft = jitted(hidden, placed, weights, vocab_axis, 5, sharding, taught)
        one_soft = jitted(hidden, layout, weights, vocab_axis, 5, None, taught)
        assert abs(one_soft[0][0] - one[0][0]) > 1
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), soft, one_soft)

# Rows [B, L] over data and context, the head's columns over data: heads are gathered, gradients scattered.
hidden, head, wide = random.normal(size=(48, 6)), random.normal(size=(6, vocab)), wide
rows = lambda x: np.reshape(x, (8, 6, *np.shape(x)[1:]))
mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"), axis_types=(AxisType.Auto,) * 3)
sharding = LossSharding(mesh, ("data",), "tensor", ("context",), "data")
targets, taught = rows(targets), Teacher(rows(wide[0]), wide[1].T)
ours = jitted(rows(hidden), head.T, rows(weights), 0, 5, sharding, taught)
one = jitted(rows(hidden), head.T, rows(weights), 0, 5, None, taught)
jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), ours, one)
print("equal")
"""


def test_equals_one_device():
    """Any split of tokens and vocabulary, devices without a weighted token, both layouts of the head; no gathering."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip().endswith("equal"), done.stderr


@pytest.mark.parametrize("tokens, vocab, wrong", [(5, 8, "5 tokens"), (6, 7, "7 vocabulary")])
def test_sizes_that_do_not_divide(tokens, vocab, wrong):
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "tensor"))
    inputs = (
        jnp.zeros((tokens, 3)),
        jnp.zeros((3, vocab)),
        jnp.zeros(tokens, jnp.int32),
        jnp.ones(tokens),
    )
    with refused(ConfigError, wrong, "2 devices"):
        linear_cross_entropy(*inputs, sharding=LossSharding(mesh, ("data",), "tensor"))

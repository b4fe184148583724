"""FLOPs against the matmuls that JAX would run, and against hand counts where work is skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax.devices.chips import peak_flops
from sdar_jax.distillation import DistillConfig
from sdar_jax.model import Model
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import Batch, ObjectiveConfig, diffusion_inputs, make_inputs
from sdar_jax.paradigm import Paradigm
from sdar_jax.training.flops import TokenCounts, count_tokens, training_flops

SHAPE = ModelConfig(48, 24, 40, 3, 4, 2, 6, block_size=4, mask_token_id=47)
ROWS, LENGTH = 2, 12


def matmul_flops(jaxpr) -> int:
    """2 a multiply and add of every dot_general, those inside calls included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * int(np.prod(out)) * int(np.prod([left[axis] for axis in contracted]))
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += matmul_flops(getattr(inner, "jaxpr", inner)) if hasattr(inner, "eqns") else 0
    return total


def plain_batch() -> Batch:
    tokens = jnp.arange(ROWS * LENGTH, dtype=jnp.int32).reshape(ROWS, LENGTH) % 40
    return Batch(tokens, jnp.ones_like(tokens), jnp.ones(tokens.shape, bool))


@pytest.mark.parametrize("outputs", [LENGTH, 8])
def test_the_formula_counts_the_matmuls_of_forward_and_backward(outputs):
    """Where every key is visible nothing is masked away, so the dense products of the model are the needed ones."""
    model = Model(SHAPE, jax.random.key(0))
    batch = plain_batch()
    masked = dataclasses.replace(SHAPE, objective="masked_diffusion")
    inputs = make_inputs(batch, jax.random.key(0), ObjectiveConfig(), masked)
    inputs = inputs._replace(
        targets=inputs.targets[:, :outputs], weights=inputs.weights[:, :outputs]
    )

    def loss(model, embedded):
        # From the embeddings on: the gradient of the lookup is no matmul.
        model.embed = lambda *_: embedded
        hidden = model.hidden(inputs.tokens, inputs.positions, inputs.ranges, outputs=outputs)
        return model.unembed(hidden).sum()

    embedded = jnp.zeros((ROWS, LENGTH, SHAPE.hidden_size))
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(model, embedded)
    counted = matmul_flops(jaxpr.jaxpr)
    everything = count_tokens(inputs)._replace(num_loss_tokens=jnp.float32(ROWS * outputs))
    assert training_flops(SHAPE, everything) == counted


def test_a_teacher_s_forward_is_counted_with_its_own_pairs():
    """It reads a canvas, where all sees all, beside a student that reads blocks."""
    batch = plain_batch()
    teacher = Paradigm()
    config = ObjectiveConfig(distill=DistillConfig(), noisy_context=True)
    blocks = dataclasses.replace(SHAPE, objective="block_diffusion")
    inputs = make_inputs(batch, jax.random.key(0), config, blocks, teacher=teacher)
    assert inputs.teacher is not None

    def forward(model, embedded):
        model.embed = lambda *_: embedded
        return model.unembed(model.hidden(*inputs.teacher)).sum()

    embedded = jnp.zeros((ROWS, LENGTH, SHAPE.hidden_size))
    jaxpr = jax.make_jaxpr(forward)(Model(SHAPE, jax.random.key(0)), embedded)
    done = count_tokens(inputs)._replace(num_loss_tokens=jnp.float32(ROWS * LENGTH))
    student = training_flops(SHAPE, done._replace(teacher=None))
    assert training_flops(SHAPE, done) - student == matmul_flops(jaxpr.jaxpr)
    # One copy is read: of three blocks of four, each sees all before it.
    assert (done.positions, done.pairs) == (ROWS * LENGTH, ROWS * 4 * (4 + 8 + 12))


def test_only_visible_pairs_and_real_positions_are_work():
    """A row of 6 and 5 tokens and padding, S = 4, noisy copies of one block, 3 tokens asked."""
    segments = jnp.array([[1] * 6 + [2] * 5 + [0]], jnp.int32)
    noisy_index = jnp.array([[6, 7, 8, 9, -1]], jnp.int32)
    noisy = jnp.zeros((1, 5), jnp.int32)
    weights = jnp.array([[1.0, 2.0, 0.0, 1.0, 0.0]])
    batch = Batch(jnp.zeros((1, 12), jnp.int32), segments, segments > 0, noisy_index)
    inputs = diffusion_inputs(Paradigm(block_size=4), batch, noisy, weights)
    done = count_tokens(inputs)
    clean_pairs = 4 * 4 + 2 * 6 + 4 * 4 + 1 * 5
    noisy_pairs = 4 * 4
    assert (done.positions, done.outputs, done.num_loss_tokens) == (11 + 4, 4, 3)
    assert (done.pairs, done.output_pairs) == (clean_pairs + noisy_pairs, noisy_pairs)


def test_an_moe_computes_the_experts_that_are_chosen():
    """6 FLOPs for each of the 3.04 billion weights that a token of 30B-A3B meets, without the embedding."""
    config = ModelConfig.preset("qwen3-30b-a3b")
    layer = 2 * 2048 * (32 + 4) * 128 + 2048 * 128 + 8 * 3 * 2048 * 768
    active = 48 * layer + 2048 * 151936
    done = TokenCounts(*(jnp.float32(x) for x in (1000, 1000, 0, 0, 1000)))
    assert active == pytest.approx(3.04e9, rel=0.01)
    assert training_flops(config, done) == pytest.approx(6 * active * 1000, rel=1e-9)


def test_dense_layers_and_shared_experts_are_counted():
    """The 1.4 billion weights that a token of LLaDA2.0-mini meets, by its model card, without the embedding."""
    config = ModelConfig.preset("llada2-mini")
    attention = 2 * 2048 * (16 + 4) * 128
    active = 20 * attention + 3 * 2048 * 5120 + 19 * (2048 * 256 + 9 * 3 * 2048 * 512)
    done = TokenCounts(*(jnp.float32(x) for x in (1000, 1000, 0, 0, 1000)))
    wanted = 6 * (active + 2048 * 157184) * 1000
    assert training_flops(config, done) == pytest.approx(wanted, rel=1e-9)
    assert active + 2 * 2048 * 157184 == pytest.approx(1.4e9, rel=0.05)


def test_a_large_autoregressive_model_needs_six_flops_a_weight_and_token():
    config = ModelConfig.preset("qwen3-8b")
    tokens = 4096
    pairs = tokens * (tokens + 1) / 2
    ones = jnp.ones((1, tokens), jnp.int32)
    batch = Batch(ones, ones, ones.astype(bool))
    done = count_tokens(make_inputs(batch, jax.random.key(0), ObjectiveConfig(), config))
    assert done.pairs == pytest.approx(pairs, rel=1e-6)
    weights = (
        8.19e9 - config.vocab_size * config.hidden_size
    )  # all but the embedding, which is looked up
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * pairs
    assert training_flops(config, done) == pytest.approx(
        6 * weights * tokens + attention, rel=0.005
    )


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_a_peak_is_known_or_is_not_invented(kind, peak):
    assert peak_flops(kind) == peak

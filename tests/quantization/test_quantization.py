"""Int8 weights: how far they are from the floats, and that every forward uses them as the floats they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax import generate, load_pretrained, logits, nelbo, save_pretrained
from sdar_jax.decoding import Engine
from sdar_jax.errors import ConfigError
from sdar_jax.model import stack_layers
from sdar_jax.model.matmul import dot
from sdar_jax.model.quantization import QArray, dequantized, quantize, quantize_weight
from tests.tiny import MASK, tiny_model

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]


def floats(model):
    """The quantised model with the floats that its integers stand for."""
    return jax.tree.map(dequantized, model, is_leaf=lambda x: isinstance(x, QArray))


@pytest.mark.parametrize(
    ("field", "spec", "shape"),
    [
        ("qkv", "btd,grkd->btgrk", (1, 3, 4, 12)),
        ("output", "btgrk,dgrk->btd", (12, 1, 2, 4)),
        ("gate_up", "btd,cfd->btcf", (2, 5, 12)),
        ("down", "btf,df->btd", (12, 5)),
        ("head", "btd,vd->btv", (7, 12)),
    ],
)
def test_each_weight(field, spec, shape):
    """Within half a step of the float, a step being the largest of the output's inputs over 127.5."""
    weight = jax.random.normal(jax.random.key(0), shape)
    quantized = quantize_weight(weight, field)
    assert quantized.qvalue.dtype == jnp.int8
    # Integers end at 127, half a step short of the largest.
    assert np.all(np.abs(dequantized(quantized) - weight) <= 0.5001 * quantized.scale)
    inputs = len(spec.split(",")[0].removeprefix("bt"))
    x = jax.random.normal(jax.random.key(1), (2, 3, *shape[-inputs:]))
    expected = jnp.einsum(spec, x, dequantized(quantized))
    np.testing.assert_allclose(dot(x, quantized, inputs=inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_forwards_use_what_the_integers_stand_for(x64, tied):
    model = quantize(tiny_model(tie_embeddings=tied))
    assert model.layers[0].qkv[...].qvalue.dtype == jnp.int8
    assert tied or model.head[...].qvalue.dtype == jnp.int8
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, MASK)
    expected = logits(floats(model), tokens, block_size=4)
    np.testing.assert_allclose(logits(model, tokens, block_size=4), expected, rtol=1e-9, atol=1e-9)
    bounds = [nelbo(each, tokens, block_size=4, samples=2)[0] for each in (model, floats(model))]
    np.testing.assert_allclose(*bounds, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.ci
def test_decoding_uses_what_the_integers_stand_for(x64):
    """In `generate`, and in an engine with more prompts than rows, whose pages one after another uses."""
    model, options = quantize(tiny_model(num_layers=1)), {"window_slots": 1}
    done, wanted = (
        generate(each, PROMPTS, max_new_tokens=9, **options) for each in (model, floats(model))
    )
    assert [c.tokens for c in done] == [c.tokens for c in wanted]
    engine = Engine(model, batch_slots=2, pages=6, page_size=8, prefill_tokens=4, **options)
    result = lambda c: (c.tokens, c.finish_reason, c.denoising_forwards, c.commit_forwards)
    assert [result(c) for c in engine.generate(PROMPTS, max_new_tokens=9)] == [
        result(c) for c in done
    ]


def test_close_to_the_float_model():
    model = tiny_model(jnp.float32, initializer_range=0.1)
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, MASK)
    exact, rounded = (logits(each, tokens, block_size=4) for each in (model, quantize(model)))
    assert float(jnp.abs(rounded - exact).max()) < 0.05 * float(jnp.abs(exact).max())


def test_stacked_layers_are_refused():
    with pytest.raises(ConfigError, match="stacked for training; quantize unstack_layers"):
        quantize(stack_layers(jax.tree.map(jnp.copy, tiny_model(jnp.float32))))


def test_directories(tmp_path):
    """Each weight is quantised as it is read, to what `quantize` makes of it; a quantised model is not written."""
    model = tiny_model(jnp.float32)
    save_pretrained(model, tmp_path / "model")
    loaded, expected = load_pretrained(tmp_path / "model", dtype="int8"), quantize(model)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ConfigError, match="weights are int8.*save the float model"):
        save_pretrained(loaded, tmp_path / "again")
    assert not (tmp_path / "again").exists()

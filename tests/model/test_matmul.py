"""Matmuls of few rows, in the form that a CPU without AVX-512 computes fastest, against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax.model import matmul
from sdar_jax.model.matmul import dot
from sdar_jax.model.quantization import quantize_weight


def computed(monkeypatch, avx512: bool | None, x, weight, **options) -> tuple[np.ndarray, str]:
    """The product, and the program that computes it."""
    monkeypatch.setattr(matmul, "has_avx512", lambda: avx512)
    program = jax.jit(lambda x: dot(x, weight, **options)).lower(x)
    return np.asarray(program.compile()(x)), program.as_text()


@pytest.mark.parametrize("rows", [(1, 2), (3, 5), (32,)])
@pytest.mark.parametrize(("inputs", "shape"), [(1, (2, 3, 32, 128)), (3, (160, 2, 4, 16))])
def test_few_rows_are_products_and_sums(rows, inputs, shape, monkeypatch):
    weight = jax.random.normal(jax.random.key(0), shape)
    x = jax.random.normal(jax.random.key(1), (*rows, *shape[len(shape) - inputs :]))
    expected, plain = computed(monkeypatch, True, x, weight, inputs=inputs)
    found, streamed = computed(monkeypatch, False, x, weight, inputs=inputs)
    assert "dot_general" in plain and "dot_general" not in streamed
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "size", "avx512"), [(1, 256, False), (33, 256, False), (4, 64, False), (4, 256, None)]
)
def test_others_are_not(rows, size, avx512, monkeypatch):
    weight, x = jnp.ones((size, 64)), jnp.ones((rows, 64))
    _, program = computed(monkeypatch, avx512, x, weight)
    assert "dot_general" in program


def test_int8_weights_and_their_gradients(monkeypatch):
    weight = quantize_weight(jax.random.normal(jax.random.key(0), (256, 128)), "down")
    x = jax.random.normal(jax.random.key(1), (4, 128))
    expected, _ = computed(monkeypatch, True, x, weight)
    found, _ = computed(monkeypatch, False, x, weight)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    slope = jax.grad(lambda x: jnp.sin(dot(x, weight)).sum())
    by_sums = slope(x)
    monkeypatch.setattr(matmul, "has_avx512", lambda: True)
    np.testing.assert_allclose(by_sums, slope(x), rtol=1e-4, atol=1e-4)

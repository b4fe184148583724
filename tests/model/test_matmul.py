"""Matmuls of few rows, in the form that some CPUs compute fastest, against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax.devices.chips import CpuKind
from sdar_jax.model import matmul
from sdar_jax.model.matmul import dot
from sdar_jax.model.quantization import quantize_weight

AVX2, INTEL = CpuKind("AuthenticAMD", False), CpuKind("GenuineIntel", True)
AMD = CpuKind("AuthenticAMD", True)


def computed(monkeypatch, cpu: CpuKind | None, x, weight, **options) -> tuple[np.ndarray, str]:
    """The product, and the program that computes it."""
    monkeypatch.setattr(matmul, "cpu_kind", lambda: cpu)
    program = jax.jit(lambda x: dot(x, weight, **options)).lower(x)
    return np.asarray(program.compile()(x)), program.as_text()


@pytest.mark.parametrize("rows", [(1, 2), (3, 5), (32,)])
@pytest.mark.parametrize(("inputs", "shape"), [(1, (2, 3, 32, 128)), (3, (160, 2, 4, 16))])
def test_few_rows_are_products_and_sums(rows, inputs, shape, monkeypatch):
    weight = jax.random.normal(jax.random.key(0), shape)
    x = jax.random.normal(jax.random.key(1), (*rows, *shape[len(shape) - inputs :]))
    expected, plain = computed(monkeypatch, INTEL, x, weight, inputs=inputs)
    found, streamed = computed(monkeypatch, AVX2, x, weight, inputs=inputs)
    assert "dot_general" in plain and "dot_general" not in streamed
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "size", "cpu"),
    [
        (1, 256, AVX2),
        (33, 256, AVX2),
        (4, 64, AVX2),
        (4, 256, None),
        (4, 2**12, AMD),
        (4, 2**14, INTEL),
    ],
)
def test_others_are_not(rows, size, cpu, monkeypatch):
    weight, x = jnp.ones((size, 64)), jnp.ones((rows, 64))
    _, program = computed(monkeypatch, cpu, x, weight)
    assert "dot_general" in program


def test_int8_weights_and_their_gradients(monkeypatch):
    weight = quantize_weight(jax.random.normal(jax.random.key(0), (256, 128)), "down")
    x = jax.random.normal(jax.random.key(1), (4, 128))
    expected, _ = computed(monkeypatch, INTEL, x, weight)
    found, _ = computed(monkeypatch, AVX2, x, weight)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    slope = jax.grad(lambda x: jnp.sin(dot(x, weight)).sum())
    by_sums = slope(x)
    monkeypatch.setattr(matmul, "cpu_kind", lambda: INTEL)
    np.testing.assert_allclose(by_sums, slope(x), rtol=1e-4, atol=1e-4)


def test_large_weights_on_amds_with_avx512(monkeypatch):
    weight, x = jnp.ones((2**13, 64)), jnp.ones((4, 64))
    _, program = computed(monkeypatch, AMD, x, weight)
    assert "dot_general" not in program

"""The matmuls of the network: floats, int8, with low-rank matrices, and those of a layer that a loop is at."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from sdar_jax.devices.chips import cpu_kind, platform
from sdar_jax.devices.sharding import current_mesh
from sdar_jax.model.adapted import Adapted
from sdar_jax.model.quantization import QArray

# Rows of which some CPUs compute a matmul faster as products and sums (`benchmarks.matmul_forms`).
_STREAMED_ROWS = range(2, 33)


class WeightOfLayer:
    """One of the weights that the layers have of a name, where only the running program knows of which layer.

    Each is left where it lies: `dot` switches between as many matmuls.
    """

    def __init__(self, weights: Sequence[Any], layer: Int[Array, ""]):
        self.weights = weights
        self.layer = layer
        self.shape = weights[0].shape

    def __getitem__(self, _) -> "WeightOfLayer":
        return self


def dot(
    x: Array, weight: nnx.Param | Any, *, inputs: int = 1, accumulate: DTypeLike | None = None
) -> Array:
    """Computes x W^T: [..., *in] and [*out, *in] give [..., *out], in the dtype of x, or in `accumulate`.

    Args:
        inputs: how many axes `in` has.
    """
    weight = weight[...]
    if isinstance(weight, WeightOfLayer):
        options = {"inputs": inputs, "accumulate": accumulate}
        of_layers = [partial(dot, weight=each, **options) for each in weight.weights]
        return jax.lax.switch(weight.layer, of_layers, x)
    if isinstance(weight, Adapted):
        product = dot(x, weight.base, inputs=inputs, accumulate=accumulate)
        through = lambda a, b: dot(dot(x, a, inputs=inputs), b)
        return product + weight.added(through, product).astype(product.dtype)
    if not isinstance(weight, QArray):
        return _product(x, weight.astype(x.dtype), inputs, accumulate)
    product = _product(x, weight.qvalue.astype(x.dtype), inputs, accumulate)
    return (product * weight.scale.reshape(weight.scale.shape[:-inputs])).astype(product.dtype)


def _product(x: Array, weight: Array, inputs: int, accumulate: DTypeLike | None) -> Array:
    rows, outputs = x.shape[:-inputs], weight.shape[:-inputs]
    flat = current_mesh() is None
    if flat:
        # XLA would lay a weight of more axes out anew, in each call. On a mesh they stay: it may split any of them.
        x = x.reshape(*rows, math.prod(x.shape[-inputs:]))
        weight = weight.reshape(math.prod(outputs), x.shape[-1])
        inputs = 1
        if _is_streamed(math.prod(rows), weight):
            return _streamed(x, weight, accumulate).reshape(*rows, *outputs)
    last = lambda array: tuple(range(array.ndim - inputs, array.ndim))
    product = jax.lax.dot_general(
        x, weight, ((last(x), last(weight)), ((), ())), preferred_element_type=accumulate
    )
    if flat and len(outputs) > 2 and platform() == "tpu":
        # Or XLA would have these axes, and so the weight's, in another order, and copy the weight for it.
        product = jax.lax.optimization_barrier(product)
    return product.reshape(*rows, *outputs)


def _is_streamed(rows: int, weight: Array) -> bool:
    least = _least_streamed()
    wide = weight.dtype.itemsize >= 4 and platform() == "cpu"
    return least is not None and wide and rows in _STREAMED_ROWS and weight.size >= least


def _least_streamed() -> int | None:
    """Returns how many numbers a weight has at least that few rows are streamed through, on this CPU; None for none.

    Of smaller ones the library is as fast or faster, or compiling takes longer than is saved. Intel's with AVX-512 were
    not measured.
    """
    kind = cpu_kind()
    if kind is None or (kind.avx512 and kind.vendor != "AuthenticAMD"):
        return None
    return 2**19 if kind.avx512 else 2**14


def _streamed(x: Array, weight: Array, accumulate: DTypeLike | None) -> Array:
    """Computes x W^T, [..., in] and [out, in] giving [rows, out], so that XLA fuses it into one loop over the weight.

    Each of its rows meets all of x while it is in the first cache; the library that XLA calls would copy it first.
    """
    rows = x.reshape(-1, x.shape[-1])
    wide = jnp.result_type(x.dtype, accumulate or x.dtype)
    products = weight[:, None, :].astype(wide) * rows[None].astype(wide)
    return products.sum(axis=-1).T

"""The matmuls of the network: floats, int8, and those of a layer that a loop is at."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from sdar_jax.model.quantization import QArray


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


def dot(spec: str, x: Array, weight: nnx.Param | Any, accumulate: DTypeLike | None = None) -> Array:
    """Computes einsum(spec, x, weight) in the dtype of x, or in `accumulate`. The result's axes end in the outputs."""
    weight = weight[...]
    if isinstance(weight, WeightOfLayer):
        of_layers = [
            partial(dot, spec, weight=each, accumulate=accumulate) for each in weight.weights
        ]
        return jax.lax.switch(weight.layer, of_layers, x)
    if not isinstance(weight, QArray):
        return jnp.einsum(spec, x, weight.astype(x.dtype), preferred_element_type=accumulate)
    product = jnp.einsum(spec, x, weight.qvalue.astype(x.dtype), preferred_element_type=accumulate)
    operands, result = spec.split("->")
    _, weight_axes = operands.split(",")
    summed = tuple(i for i, axis in enumerate(weight_axes) if axis not in result)
    return (product * weight.scale.squeeze(summed)).astype(product.dtype)

"""Layers for decoding in a loop, whose body is compiled once for all of them: for CPUs.

A program has a forward for each width, and compiling every layer of every one is what a first answer waits for. A scan
over stacked layers would copy each layer's weights in each forward, which takes longer than to multiply by them. Here
each matmul of the body is a switch over the layers' own weights: for a CPU that is a call into a library, with nothing
to compile. What else a layer has, norms and biases, is small, and stacked. A GPU would wait for the host at each
switch, and a TPU keeps its layers apart (`unstack_layers`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Int

from sdar_jax.devices.chips import platform
from sdar_jax.model.adapted import is_whole
from sdar_jax.model.config import ModelConfig
from sdar_jax.model.layer import Layer
from sdar_jax.model.matmul import WeightOfLayer
from sdar_jax.model.quantization import is_quantized


class RolledLayers(nnx.Module):
    """Dense layers of one shape; `at` gives the one that a loop is at."""

    def __init__(self, layers: Sequence[Layer]):
        paths, self.structure = jax.tree.flatten_with_path(layers[0], is_leaf=is_whole)
        each = [jax.tree.leaves(layer, is_leaf=is_whole) for layer in layers]
        matrices = [_is_matrix(path) for path, _ in paths]
        columns = zip(matrices, zip(*each, strict=True), strict=True)
        self.columns = nnx.data([list(c) if matrix else jnp.stack(c) for matrix, c in columns])

    def at(self, index: Int[Array, ""]) -> Layer:
        """Returns the layer of this index, whose matrices are `WeightOfLayer`."""
        leaves = [
            WeightOfLayer(c, index) if isinstance(c, list) else c[index] for c in self.columns
        ]
        return jax.tree.unflatten(self.structure, leaves)


def rolls(config: ModelConfig, mesh: Mesh | AbstractMesh | None) -> bool:
    """Whether a model decodes with `RolledLayers`, and so over pages made for them, on `mesh` or one device."""
    dense, several = not config.num_experts, config.num_layers > 1
    return dense and several and mesh is None and platform() == "cpu"


def _is_matrix(path: Sequence[Any]) -> bool:
    return any(is_quantized(str(getattr(key, "name", ""))) for key in path)

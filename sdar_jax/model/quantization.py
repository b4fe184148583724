"""Weight-only int8 for decoding: each matmul weight as integers with one float scale per output (qwix's QArray).

A forward that is bound by reading weights reads half the bytes of bfloat16. Activations, norms, the embedding, keys
and values, and the experts of an MoE with their routers stay as they are. The product is scaled after the matmul, so
that the integers go into it with no more than a conversion, which XLA fuses on GPU and TPU:

    x W = (x Q) s        Q = round(W / s),  s = max |W| / 127.5 over each output's inputs
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jaxtyping import Array

from sdar_jax.errors import ConfigError

# How many axes of each weight (layer.py) are its outputs, those that come first: each of their entries has a scale.
OUTPUT_AXES = {
    "qkv": 3,
    "output": 1,
    "gate_up": 2,
    "down": 1,
    "shared_gate_up": 2,
    "shared_down": 1,
    "head": 1,
}

QArray = qwix.QArray


def is_quantized(field: str) -> bool:
    """Returns whether the weights of this name are stored as integers."""
    return field in OUTPUT_AXES


def quantize_weight(weight: Array, field: str, stacked: int = 0) -> QArray:
    """Quantizes one weight.

    Args:
        field: its name in `Model` or `Layer`.
        stacked: how many axes of it layers are stacked on.
    """
    return _to_int8(weight, stacked + OUTPUT_AXES[field])


@partial(jax.jit, static_argnums=1)
def _to_int8(weight: Array, outputs: int) -> QArray:
    # Scales take the type of what is quantised.
    wide = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    return qwix.quantize(wide, jnp.int8, channelwise_axes=tuple(range(outputs)))


def quantize[Tree](model: Tree) -> Tree:
    """Makes the same model with its matmul weights in int8, for `generate`, `Engine`, `logits` and `nelbo`.

    Shares what it leaves as it is with the given one. Not for training or `save_pretrained`: keep the float model.

    Raises:
        ConfigError: the layers are stacked for training.
    """
    flat, structure = jax.tree.flatten_with_path(model)
    names = [[str(getattr(key, "name", "")) for key in path] for path, _ in flat]
    if any({"first", "body"} & set(each) for each in names):
        raise ConfigError("the layers are stacked for training; quantize unstack_layers(model)")
    leaves = []
    for (_, leaf), path_names in zip(flat, names, strict=True):
        field = next((name for name in path_names if is_quantized(name)), None)
        leaves.append(leaf if field is None else quantize_weight(leaf, field))
    return jax.tree.unflatten(structure, leaves)


def dequantized(weight: Any) -> Array:
    """Returns the floats that a weight represents; a float one as it is."""
    return qwix.dequantize(weight) if isinstance(weight, QArray) else weight

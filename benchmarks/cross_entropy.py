"""The weighted linear cross-entropy, loss and gradients, against others on the same shapes.

    python -m benchmarks.cross_entropy

Half of the tokens are masked and have a weight, as in training. The others compute every token: full logits with optax,
and tokamax's linear_softmax_cross_entropy_loss if it is installed. On a CPU a small shape in float32; the chip's share
of its peak needs a GPU or TPU.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import seconds
from sdar_jax.devices.chips import peak_flops
from sdar_jax.losses import linear_cross_entropy


class Shape(NamedTuple):
    name: str
    tokens: int
    width: int
    vocab: int


CHIP_SHAPES = [
    Shape("1.7B", 8192, 2048, 151_936),
    Shape("8B", 8192, 4096, 151_936),
    Shape("8B, one of 4 vocabulary shards", 8192, 4096, 151_936 // 4),
]
CPU_SHAPES = [Shape("100M", 2048, 768, 32_000)]


def inputs(shape: Shape, dtype) -> tuple[jax.Array, ...]:
    """hidden, head, targets, weights."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (shape.tokens, shape.width), dtype)
    head = 0.02 * jax.random.normal(keys[1], (shape.width, shape.vocab), dtype)
    targets = jax.random.randint(keys[2], (shape.tokens,), 0, shape.vocab)
    weights = jnp.where(jax.random.uniform(keys[3], (shape.tokens,)) < 0.5, 2.0, 0.0)
    return hidden, head, targets, weights


def ours(hidden, head, targets, weights):
    return linear_cross_entropy(hidden, head, targets, weights)[0]


def full_logits(hidden, head, targets, weights):
    logits = jnp.einsum("nd,dv->nv", hidden, head, preferred_element_type=jnp.float32)
    return (weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets)).sum()


def rivals() -> Iterator[tuple[str, Callable]]:
    yield "full logits", full_logits
    if importlib.util.find_spec("tokamax"):
        import tokamax  # pyright: ignore[reportMissingImports]

        # It takes no weights: the plain sum is the nearest it has.
        loss = lambda hidden, head, targets, weights: tokamax.linear_softmax_cross_entropy_loss(
            hidden, targets, head
        )
        yield "tokamax (unweighted)", loss


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    peak = peak_flops(jax.devices()[0].device_kind)
    if on_cpu:
        print(
            "On this CPU: seconds and memory. TFLOP/s and the fraction of peak need a GPU or TPU."
        )
    for shape in CPU_SHAPES if on_cpu else CHIP_SHAPES:
        args = inputs(shape, jnp.float32 if on_cpu else jnp.bfloat16)
        took = _report(shape, "ours", ours, args, None)
        if peak is not None:
            flops = 6.0 * float(jnp.count_nonzero(args[3])) * shape.width * shape.vocab
            print(
                f"  {flops / took / 1e12:.0f} TFLOP/s of the weighted tokens, {flops / took / peak:.0%} of the peak"
            )
        for name, loss in rivals():
            _report(shape, name, loss, args, took)


def _report(shape: Shape, name: str, loss: Callable, args: tuple, ours_took: float | None) -> float:
    step = jax.jit(jax.grad(loss, (0, 1)))
    memory = step.lower(*args).compile().memory_analysis()
    held = 0 if memory is None else memory.temp_size_in_bytes
    took = seconds(step, *args, calls=3)
    ratio = "" if ours_took is None else f", ours is {took / ours_took:.2f}x as fast"
    print(
        f"{shape.name}, {name}: {1e3 * took:.1f} ms, {held / 1e6:.0f} MB of temporaries{ratio}",
        flush=True,
    )
    return took


if __name__ == "__main__":
    main()

"""Range attention against what else there is for the same work: forward, and forward with backward.

    python -m benchmarks.attention [--torch-python PATH]

On a GPU or TPU: TFLOP/s that the visible pairs need (not those that a dense mask computes), the fraction of the chip's
bfloat16 peak, and how many times faster than jax.nn.dot_product_attention (XLA and, on a GPU, cuDNN) and, if it is
installed, tokamax, both with the dense mask or, for the causal shape, causal.

On a CPU: the chunked implementation in turns with PyTorch's scaled_dot_product_attention and the dense mask, in
float32. What only an accelerator can show is said, not guessed.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.timing import TorchPeer, compare, seconds
from sdar_jax import visibility
from sdar_jax.attention import attention
from sdar_jax.devices.chips import peak_flops


class Shape(NamedTuple):
    """One document of `length` clean tokens, in the hybrid layout, or causal (block_size None)."""

    name: str
    length: int
    block_size: int | None
    heads: int
    kv_heads: int
    head_dim: int

    def positions(self) -> int:
        return self.length if self.block_size is None else 2 * self.length

    def ranges(self) -> visibility.Ranges:
        document = jnp.ones((1, self.length), jnp.int32)
        if self.block_size is None:
            return visibility.causal(document)
        return visibility.hybrid(document, self.block_size)

    def inputs(self, dtype) -> list[jax.Array]:
        """q, k, v and the gradient of the output."""
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        keys = jax.random.split(jax.random.key(0), 4)
        sizes = [(1, self.positions(), n, self.head_dim) for n in heads]
        return [jax.random.normal(key, size, dtype) for key, size in zip(keys, sizes, strict=True)]

    def flops(self) -> dict[str, float]:
        """Two matmuls a visible pair forward, five backward."""
        start, end = self.ranges()
        pair = 4.0 * self.heads * self.head_dim * float((end - start).sum())
        return {"forward": pair, "forward and backward": 3.5 * pair}


CHIP_SHAPES = [
    Shape("1.7B", 4096, 4, 16, 8, 128),
    Shape("8B", 4096, 4, 32, 8, 128),
    Shape("30B-A3B", 4096, 4, 32, 4, 128),
    Shape("30B-A3B Sci", 20480, 4, 32, 4, 128),
    Shape("8B, causal", 8192, None, 32, 8, 128),
]
CPU_SHAPE = Shape("CPU", 2048, 4, 8, 8, 64)


def both_ways(
    attend: Callable, inputs: Sequence
) -> Iterator[tuple[str, jax.stages.Wrapped, tuple]]:
    """(name, jitted function, arguments) of the forward, and of the forward and backward."""
    q, k, v, d_out = inputs
    yield "forward", jax.jit(attend), (q, k, v)
    yield (
        "forward and backward",
        jax.jit(lambda q, k, v, d: jax.vjp(attend, q, k, v)[1](d)),
        (q, k, v, d_out),
    )


def rivals(shape: Shape) -> Iterator[tuple[str, Callable]]:
    """Other implementations of the same function."""
    dense = (
        None
        if shape.block_size is None
        else shape.ranges().sees(jnp.arange(shape.positions()))[:, None]
    )
    masked = {"is_causal": True} if dense is None else {"mask": dense}
    names = ["xla", "cudnn"] if jax.default_backend() == "gpu" else ["xla"]
    for name in names:
        yield f"jax.nn {name}", partial(jax.nn.dot_product_attention, implementation=name, **masked)
    if importlib.util.find_spec("tokamax"):
        import tokamax  # pyright: ignore[reportMissingImports]

        yield "tokamax", partial(tokamax.dot_product_attention, **masked)


def on_chip():
    kind = jax.devices()[0].device_kind
    peak = peak_flops(kind)
    for shape in CHIP_SHAPES:
        inputs, flops = shape.inputs(jnp.bfloat16), shape.flops()
        ours = partial(attention, ranges=shape.ranges())
        took = {name: seconds(function, *args) for name, function, args in both_ways(ours, inputs)}
        for name, value in took.items():
            rate = flops[name] / value
            share = "" if peak is None else f", {rate / peak:.0%} of the peak"
            print(
                f"{shape.name}, L = {shape.length}, {name}: {1e3 * value:.2f} ms, {rate / 1e12:.0f} TFLOP/s{share}"
            )
        for rival, attend in rivals(shape):
            for name, function, args in both_ways(attend, inputs):
                print(f"  {rival}, {name}: {_ratio(function, args, took[name])}", flush=True)


def _ratio(function: Callable, args: tuple, ours: float) -> str:
    try:
        theirs = seconds(function, *args)
    except Exception as error:  # A rival that cannot run this shape is a result, not a failure.
        return f"does not run: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return f"{1e3 * theirs:.2f} ms, ours is {theirs / ours:.2f}x as fast"


def on_cpu(torch_python: str | None, pairs: int):
    print("On this CPU no kernel runs: TFLOP/s, the fraction of peak and cuDNN need a GPU or TPU.")
    if torch_python is None:
        print("Give --torch-python PATH, a Python that has torch, to compare with PyTorch here.")
        return
    shape = CPU_SHAPE
    inputs = shape.inputs(jnp.float32)
    ours = partial(attention, ranges=shape.ranges(), implementation="chunked")
    *_, (_, function, args) = both_ways(ours, inputs)
    sizes = {"length": shape.length, "block_size": shape.block_size, "batch": 1}
    heads = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    with TorchPeer(torch_python, "attention", **sizes, **heads) as peer:
        ratio = compare(lambda: function(*args), lambda: peer.run().seconds, pairs)
    print(
        f"L = {shape.length}, S = {shape.block_size}, {shape.heads} heads of {shape.head_dim}, float32, ",
        end="",
    )
    print(f"forward and backward: {ratio}")
    for length in (1024, 2048, 4096, 8192):
        longer = shape._replace(length=length)
        abstract = [
            jax.ShapeDtypeStruct(x.shape, x.dtype)
            for x in jax.eval_shape(partial(longer.inputs, jnp.float32))
        ]
        attend = partial(attention, ranges=longer.ranges(), implementation="chunked")
        *_, (_, function, _) = both_ways(attend, abstract)
        memory = function.lower(*abstract).compile().memory_analysis()
        assert memory is not None, "XLA says what memory a program for a CPU takes"
        held = memory.temp_size_in_bytes
        dense = (2 * length) ** 2 / 1e6
        print(
            f"L = {length}: {held / 1e6:.0f} MB held, {held / length:.0f} bytes a token; a dense mask: {dense:.0f} MB"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", help="on a CPU: a Python that has torch")
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    if jax.default_backend() == "cpu":
        on_cpu(args.torch_python, args.pairs)
    else:
        on_chip()


if __name__ == "__main__":
    main()

"""Matmuls of few rows on this CPU, in the forms that XLA may be given: what `model.matmul.dot` chooses by.

    python -m benchmarks.matmul_forms [--shapes 768x4096 4096x768] [--rows 1 2 4 8 16 32 64] [--rounds 7]

A program multiplies `rows` rows by 30 matrices of one shape, one after another, so that no matrix is in a cache when
its turn comes. Forms take turns; times are medians, in milliseconds a program.

    x @ W       W [in, out]: rows first
    W.T @ x     W [in, out]: weights first; the small product is transposed
    x @ W.T     W [out, in]: rows first, both over their last axis
    W @ x       W [out, in]: weights first, both over their last axis; the small product is transposed
    sums        W [out, in]: products and sums in one loop over W, as `model.matmul` does without AVX-512
"""

import argparse
import platform
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.timing import seconds

_MATRICES = 30


def _multiply(form: str, x: jax.Array, weights: list[jax.Array]) -> jax.Array:
    """Each product depends on the one before, which adds nothing to it."""
    for weight in weights:
        if form == "x @ W":
            product = x @ weight
        elif form == "W.T @ x":
            product = jax.lax.dot_general(weight, x, (((0,), (1,)), ((), ()))).T
        elif form == "x @ W.T":
            product = jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))
        elif form == "sums":
            product = (weight[:, None, :] * x[None]).sum(-1).T
        else:
            product = jax.lax.dot_general(weight, x, (((1,), (1,)), ((), ()))).T
        x = x + 1e-20 * product[:, :1]
    return x


def programs(form: str, inputs: int, outputs: int) -> tuple[Callable, list[jax.Array]]:
    shape = (inputs, outputs) if form in ("x @ W", "W.T @ x") else (outputs, inputs)
    keys = jax.random.split(jax.random.key(0), _MATRICES)
    return jax.jit(partial(_multiply, form)), [jax.random.normal(key, shape) for key in keys]


def cpu_kind() -> str:
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    widest = [each for each in ("avx2", "avx512f") if each in named.get("flags", "").split()]
    return f"{named.get('model name', platform.processor())}, {' and '.join(widest) or 'no AVX'}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["768x4096", "4096x768"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"{cpu_kind()}; jax {jax.__version__}; {_MATRICES} float32 matrices a program")
    forms = ("x @ W", "W.T @ x", "x @ W.T", "W @ x", "sums")
    print(f"{'in x out':>12} {'rows':>5} " + " ".join(f"{form:>9}" for form in forms))
    for shape in options.shapes:
        inputs, outputs = map(int, shape.split("x"))
        made = [programs(form, inputs, outputs) for form in forms]
        for rows in options.rows:
            x = jnp.ones((rows, inputs))
            times: list[list[float]] = [[] for _ in forms]
            for _ in range(options.rounds):
                for (program, weights), kept in zip(made, times, strict=True):
                    kept.append(seconds(program, x, weights, calls=3, repeats=1))
            medians = [1e3 * statistics.median(kept) for kept in times]
            print(f"{shape:>12} {rows:>5} " + " ".join(f"{each:>9.1f}" for each in medians))


if __name__ == "__main__":
    main()

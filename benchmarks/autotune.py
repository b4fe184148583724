"""Measures block shapes of the range attention kernels on the chip that is here, and writes the best into the table.

    python -m benchmarks.autotune [--head-dims 64 128] [--length 4096] [--dry-run]

Each candidate runs the hybrid layout of one document, S = 4, 32 query heads and 8 key-value heads, bfloat16. A shape
that does not compile is left out. The rows written are for this chip alone (`chip` = its device_kind); those for any
chip stay. Needs a GPU or TPU that the kernels support.
"""

import argparse
import itertools
import sys
import tomllib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from benchmarks.timing import seconds
from sdar_jax import visibility
from sdar_jax.attention import attention
from sdar_jax.attention.tile_sizes import TABLE, Row, TileSizes, chip_here, tile_sizes_for, trial

IMPLEMENTATIONS = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}
KERNELS = ("forward", "dq", "dkv")
# Query rows, keys and stages to try: what compiles of them depends on kernel and chip.
SHAPES = {
    "mosaic_gpu": ((64, 128, 192), (64, 128), (2, 3, 4)),
    "mosaic_tpu": ((256, 512, 1024, 2048), (512, 1024, 2048), (1, 2, 3)),
}
HEADS, KV_HEADS, BLOCK_SIZE = 32, 8, 4


def candidates(implementation: str) -> Iterator[TileSizes]:
    return itertools.starmap(TileSizes, itertools.product(*SHAPES[implementation]))


def work(kernel: str, head_dim: int, length: int) -> tuple[Callable, tuple]:
    """A function that is to be traced anew for each candidate, and its arguments: the forward, or the backward."""
    ranges = visibility.hybrid(jnp.ones((1, length), jnp.int32), BLOCK_SIZE)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    shapes = [(1, 2 * length, count, head_dim) for count in heads]
    q, k, v, d_out = (
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    )
    attend = lambda q, k, v: attention(q, k, v, ranges)
    if kernel == "forward":
        return attend, (q, k, v)
    _, pullback = jax.vjp(attend, q, k, v)
    # Of the backward, only the kernel in question stays in the program.
    asked = slice(0, 1) if kernel == "dq" else slice(1, 3)
    return lambda pullback, d_out: pullback(d_out)[asked], (pullback, d_out)


def measure(row: Row, tile_sizes: TileSizes, length: int) -> float | None:
    """Seconds, or None if these tile sizes do not compile or run."""
    with trial(row, tile_sizes):
        function, args = work(row.kernel, row.head_dim, length)
        try:
            return seconds(jax.jit(function), *args)
        except Exception as error:  # Whatever the compiler objects to, the next candidate may do.
            print(
                f"  {tuple(tile_sizes)}: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
            )
            return None


def tune(row: Row, length: int) -> tuple[TileSizes, str] | None:
    """The fastest tile sizes and what was measured, or None if nothing ran."""
    shipped = tile_sizes_for(row.implementation, row.kernel, row.head_dim)
    times = {}
    for tile_sizes in dict.fromkeys((shipped, *candidates(row.implementation))):
        if (took := measure(row, tile_sizes, length)) is not None:
            times[tile_sizes] = took
            print(f"  {tuple(tile_sizes)}: {1e3 * took:.3f} ms", flush=True)
    if not times:
        return None
    best = min(times, key=times.__getitem__)
    before = f", {tuple(shipped)} took {1e3 * times[shipped]:.3f}" if shipped in times else ""
    return (
        best,
        f"measured at L = {length}: {1e3 * times[best]:.3f} ms{before}; best of {len(times)}",
    )


def write(found: dict[Row, tuple[TileSizes, str]]):
    """Replaces or adds these rows in tile_sizes.toml; the others and the comment on top stay as they are."""
    text = TABLE.read_text()
    head = text[: text.index("[[tile_sizes]]")]
    rows = {
        Row(*(row[name] for name in Row._fields)): row for row in tomllib.loads(text)["tile_sizes"]
    }
    for row, (tile_sizes, reason) in found.items():
        rows[row] = {**row._asdict(), **tile_sizes._asdict(), "reason": reason}
    TABLE.write_text(head + "\n".join(map(_as_toml, rows.values())))


def _as_toml(row: dict) -> str:
    quoted = lambda value: f'"{value}"' if isinstance(value, str) else str(value)
    return "[[tile_sizes]]\n" + "".join(
        f"{name} = {quoted(value)}\n" for name, value in row.items()
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dry-run", action="store_true", help="measure, and leave the table alone")
    args = parser.parse_args()
    implementation = IMPLEMENTATIONS.get(jax.default_backend())
    if implementation is None:
        sys.exit(
            f"autotune: backend {jax.default_backend()!r} says nothing of a GPU or TPU; run it on one"
        )
    found = {}
    rows = [
        Row(implementation, kernel, size, chip_here())
        for kernel in KERNELS
        for size in args.head_dims
    ]
    for row in rows:
        print(f"{row.implementation} {row.kernel}, head_dim {row.head_dim}, on {row.chip}")
        if (best := tune(row, args.length)) is not None:
            found[row] = best
    if not args.dry_run:
        write(found)
        print(f"wrote {len(found)} rows to {TABLE}")


if __name__ == "__main__":
    main()

"""Measures block shapes of the range attention kernels on the chip that is here, and writes the best into the table.

    python -m benchmarks.autotune [--head-dims 64 128] [--length 4096] [--dry-run]

Each candidate runs the hybrid layout of one document, S = 4, 32 query heads and 8 key-value heads, bfloat16. A shape
that does not compile is left out. The rows written are for this chip alone (`chip` = its device_kind); those for any
chip stay. Needs a GPU or TPU that the kernels support.
"""

import argparse
import sys
import tomllib

import jax

from sdar_jax.attention.tile_sizes import TABLE, Row, TileSizes, chip_here, tile_sizes_for
from sdar_jax.proof.tiles import KERNELS, measure

IMPLEMENTATIONS = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}


def tune(row: Row, length: int) -> tuple[TileSizes, str] | None:
    """The fastest tile sizes and what was measured, or None if nothing ran."""
    times: dict[TileSizes, float] = {}
    for tile_sizes, took in measure(row, length):
        if isinstance(took, str):
            print(f"  {tuple(tile_sizes)}: {took}", flush=True)
        else:
            times[tile_sizes] = took
            print(f"  {tuple(tile_sizes)}: {1e3 * took:.3f} ms", flush=True)
    if not times:
        return None
    best = min(times, key=times.__getitem__)
    shipped = tile_sizes_for(row.implementation, row.kernel, row.head_dim)
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

"""Tile sizes of the kernels, read from tile_sizes.toml: a row per kernel and head size, with the reason for it.

`benchmarks/autotune.py` measures the candidates on a real chip and writes rows for that chip.
"""

import contextlib
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sdar_jax.devices.chips import device, platform
from sdar_jax.errors import ConfigError

TABLE = Path(__file__).with_name("tile_sizes.toml")
ANY_CHIP = "any"


class TileSizes(NamedTuple):
    """The shape of one kernel's work.

    Attributes:
        query_tile: rows per program: query positions times the query heads that share a key-value head.
        key_tile: keys per step.
        stages: tiles in flight (GPU), sub-blocks of scores computed ahead (TPU).
    """

    query_tile: int
    key_tile: int
    stages: int = 2


class Row(NamedTuple):
    """The key of a row of the table: the kernel it is for; `chip` is a `device_kind`, or "any"."""

    implementation: str
    kernel: str
    head_dim: int
    chip: str = ANY_CHIP


_trials: dict[Row, TileSizes] = {}


def tile_sizes_for(implementation: str, kernel: str, head_dim: int) -> TileSizes:
    """Looks up the row of the chip that is here, or the one for any chip.

    Raises:
        ConfigError: no row for this kernel and head size.
    """
    table = _table(TABLE) | _trials
    for chip in (chip_here(), ANY_CHIP):
        row = Row(implementation, kernel, head_dim, chip)
        if row in table:
            return table[row]
    raise ConfigError(
        f"{TABLE.name} has no {implementation} {kernel} row for head_dim {head_dim}; add one"
    )


def chip_here() -> str:
    """Returns the `device_kind` of the accelerator that is here or compiled for; "any" on a CPU."""
    return ANY_CHIP if platform() == "cpu" else device().device_kind


def head_dims(implementation: str, kernel: str) -> list[int]:
    """Lists the head sizes that the table has for a kernel, ascending."""
    rows = [
        row
        for row in _table(TABLE)
        if row.implementation == implementation and row.kernel == kernel
    ]
    return sorted({row.head_dim for row in rows})


@contextlib.contextmanager
def trial(row: Row, tile_sizes: TileSizes) -> Iterator[None]:
    """Makes what is traced inside use these tile sizes for that kernel."""
    _trials[row] = tile_sizes
    try:
        yield
    finally:
        del _trials[row]


@cache
def _table(path: Path) -> dict[Row, TileSizes]:
    rows = tomllib.loads(path.read_text())["tile_sizes"]
    table = {}
    for row in rows:
        key = Row(*(row[name] for name in Row._fields))
        table[key] = TileSizes(*(row[name] for name in TileSizes._fields))
    return table
